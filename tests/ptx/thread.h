// One thread of translated PTX, on the machine of tests/simt: what the code that translate.py writes calls. Memory is
// checked as the machine does for C++ kernels, asynchronous copies are performed at the wait that asks for them and no
// earlier, and order.h says what a thread may read.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <source_location>
#include <utility>

#include "arithmetic.h"
#include "entry.h"

namespace ptx {

using Where = std::source_location;
#define PTX_WHERE Where w = Where::current()

enum class way : uint8_t { plain, read_only, fresh };
enum class order : uint8_t { relaxed, acquire, release, acq_rel };
enum class shuffle : uint8_t { bfly, up, down, idx };

struct Launch;

class Thread {
 public:
  std::vector<uint32_t> statics;  // offsets of the entry's static arrays in shared memory
  uint32_t arrives = 0;           // the clock when what was loaded last is there

  explicit Thread(Launch& launch);
  ~Thread();
  void exits();

  // -- special registers
  uint32_t tid() const;
  uint32_t ctaid() const;
  uint32_t ntid() const;
  uint32_t nctaid() const;
  uint32_t laneid() const;
  // A microsecond passes with each look at the clock, and other threads go on.
  uint64_t globaltimer(PTX_WHERE);
  void nanosleep(PTX_WHERE);

  // -- counting: a basic block begins; what was loaded is used
  void block(int b);
  void wait_for(uint32_t ready) { now_ = std::max(now_, ready); }

  // -- memory
  template <class P>
  uint64_t address(const P* p) const {
    return reinterpret_cast<uint64_t>(p);
  }
  uint64_t generic_of(uint64_t shared) const { return address(shared_) + uint32_t(shared); }
  uint64_t shared_of(uint64_t generic) const { return generic - address(shared_); }

  template <class T, int n>
  std::array<T, n> ld_param(uint64_t at, PTX_WHERE) {
    check_param(at, sizeof(T) * n, w);
    return get<T, n>(at);
  }
  template <class T, int n>
  std::array<T, n> ld_local(uint64_t at) {
    return get<T, n>(at);
  }
  template <class T, int n>
  void st_local(uint64_t at, const std::array<T, n>& v) {
    put<T, n>(at, v);
  }
  template <class T, int n>
  std::array<T, n> ld_shared(uint32_t at, int site, PTX_WHERE) {
    before_shared_read(at, sizeof(T) * n, site, w);
    return get<T, n>(address(shared_) + at);
  }
  template <class T, int n>
  void st_shared(uint32_t at, const std::array<T, n>& v, int site, PTX_WHERE) {
    before_shared_write(at, sizeof(T) * n, site, w);
    put<T, n>(address(shared_) + at, v);
  }
  // -- clusters: addresses in another block's shared memory have its rank, plus one, in front
  uint32_t mapa(uint32_t at, uint32_t rank) const { return at | (rank + 1) << 24; }
  template <class T, int n>
  std::array<T, n> ld_cluster(uint32_t at, int site, PTX_WHERE) {
    return get<T, n>(before_cluster_read(at, sizeof(T) * n, site, w));
  }
  void cluster_arrive(PTX_WHERE);
  void cluster_wait(PTX_WHERE);

  template <class T, int n>
  std::array<T, n> ld_global(uint64_t at, way how, int site, PTX_WHERE) {
    before_global_read(at, sizeof(T) * n, how, site, w);
    return get<T, n>(at);
  }
  template <class T, int n>
  void st_global(uint64_t at, const std::array<T, n>& v, int site, PTX_WHERE) {
    before_global_write(at, sizeof(T) * n, site, w);
    put<T, n>(at, v);
  }
  // A generic access to shared memory works and costs more than one that says so: the kernels have none.
  template <class T, int n>
  std::array<T, n> ld_generic(uint64_t at, way how, int site, PTX_WHERE) {
    not_shared(at, w);
    return ld_global<T, n>(at, how, site, w);
  }
  template <class T, int n>
  void st_generic(uint64_t at, const std::array<T, n>& v, int site, PTX_WHERE) {
    not_shared(at, w);
    st_global<T, n>(at, v, site, w);
  }

  // -- asynchronous copies
  void copy_async(uint32_t to, uint64_t from, unsigned size, unsigned given, int site, PTX_WHERE);
  void copies_commit();
  void copies_wait(size_t all_but);

  // -- blocks that talk to each other
  void fence(PTX_WHERE);
  uint32_t ld_ordered(uint64_t at, order how, int site, PTX_WHERE);
  uint32_t atomic(uint64_t at, uint32_t v, order how, int site, uint32_t (*change)(uint32_t old, uint32_t v),
                  PTX_WHERE);

  // -- blocks and warps
  uint32_t bar_red(bool vote, int site, PTX_WHERE);
  void warp_sync(unsigned mask, PTX_WHERE);
  std::pair<uint32_t, bool> shfl(shuffle how, uint32_t a, uint32_t b, uint32_t c, uint32_t mask, PTX_WHERE);
  uint32_t ballot(uint32_t mask, bool vote, PTX_WHERE);

 private:
  struct State;  // what only thread.cpp needs
  std::unique_ptr<State> state_;
  char* shared_;
  uint32_t now_ = 0;  // the clock of the counters, in round trips to memory

  template <class T, int n>
  static std::array<T, n> get(uint64_t at) {
    typedef T alias __attribute__((may_alias));
    std::array<T, n> out;
    for (int i = 0; i < n; ++i) out[size_t(i)] = reinterpret_cast<const alias*>(at)[i];
    return out;
  }
  template <class T, int n>
  static void put(uint64_t at, const std::array<T, n>& v) {
    typedef T alias __attribute__((may_alias));
    for (int i = 0; i < n; ++i) reinterpret_cast<alias*>(at)[i] = v[size_t(i)];
  }
  void place_statics();
  void check_param(uint64_t at, size_t bytes, Where w) const;
  void not_shared(uint64_t at, Where w) const;
  void before_shared_read(uint32_t at, size_t bytes, int site, Where w);
  uint64_t before_cluster_read(uint32_t at, size_t bytes, int site, Where w);
  void before_shared_write(uint32_t at, size_t bytes, int site, Where w);
  void before_global_read(uint64_t at, size_t bytes, way how, int site, Where w);
  void before_global_write(uint64_t at, size_t bytes, int site, Where w);
  uint32_t poll_counted(uint64_t at, bool again, order how, int site, Where w);
  void note(int site, uint64_t at);
};

}  // namespace ptx
