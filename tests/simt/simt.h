// In: a kernel written for csrc/cuda/device.cuh, which includes this where nvcc is not. Out: CUDA's built-ins and the
// names of device.cuh, on the CPU. Everything that a kernel can get wrong between two barriers is in machine.h.
#pragma once

#include <cmath>
#include <tuple>
#include <type_traits>

#include "machine.h"
#include "translated.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define SIMT_WHERE simt::Where where = simt::Where::current()

inline void __syncthreads(SIMT_WHERE) { simt::sync_block(0, where); }
inline int __syncthreads_or(int vote, SIMT_WHERE) { return simt::sync_block(vote != 0, where) != 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_WHERE) {
  simt::Quiet quiet;
  simt::meet("__syncwarp", mask, where, true, [](simt::Fiber*, simt::Fiber&) {});
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_WHERE) { return simt::ballot(mask, vote != 0, where); }

namespace simt {

template <class T>
T shuffle_value(const char* what, unsigned mask, T value, int source, int width, Where w) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles no other types");
  const int first = int(self->lane) & ~(width - 1);
  if (source < first || source >= first + width) source = int(self->lane);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(what, mask, bits, source, w);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_WHERE) {
  const int first = int(simt::self->lane) & ~(width - 1);
  return simt::shuffle_value("__shfl_sync", mask, value, first + (source & (width - 1)), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_WHERE) {
  return simt::shuffle_value("__shfl_xor_sync", mask, value, int(simt::self->lane) ^ bits, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_WHERE) {
  return simt::shuffle_value("__shfl_down_sync", mask, value, int(simt::self->lane + by), width, where);
}

#define FASTBN_D inline
#define FASTBN_SHARED(T, name, ...) auto& name = simt::static_shared<T __VA_ARGS__, decltype([] {})>()
#define FASTBN_DYNAMIC_SHARED(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(simt::self->block->shared)

namespace fastbn::cuda {

// ---- host ----------------------------------------------------------------------------------------------------------

struct Launch {
  int64_t blocks;
  int64_t threads;
  int64_t shared_bytes;
  bool cooperative;
  void* stream;
  int64_t cluster = 1;
};

template <class... P>
int64_t resident_blocks(void (*)(P...), int64_t threads, int64_t shared_bytes) {
  ++simt::stats.queries;
  if (shared_bytes > simt::config.shared_per_block) simt::fail("too much shared memory");
  return simt::blocks_per_multiprocessor(threads, shared_bytes);
}

// False: other programs leave no room for a cooperative launch of so many blocks.
template <class... P>
int64_t resident_clusters(void (*kernel)(P...), int64_t threads, int64_t shared_bytes, int64_t cluster) {
  return resident_blocks(kernel, threads, shared_bytes) * simt::config.multiprocessors / cluster;
}

template <class... P, class... A>
bool launch(const Launch& how, void (*kernel)(P...), A&&... args) {
  if (how.cooperative && how.blocks > simt::config.cooperative_blocks) return false;
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, {static_cast<P>(std::forward<A>(args))...}};
  const std::vector<simt::Argument> arguments = std::apply(
      [](const P&... of) { return std::vector<simt::Argument>{{&of, sizeof(P), alignof(P)}...}; }, call.args);
  if (simt::launch_translated(reinterpret_cast<const void*>(kernel), how.blocks, how.threads, how.shared_bytes,
                              how.cooperative, how.cluster, arguments)) {
    return true;
  }
  const auto apply = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args); };
  simt::run(how.blocks, how.threads, how.shared_bytes, how.cooperative, how.cluster, apply, &call);
  return true;
}

inline Device query_device() {
  ++simt::stats.queries;
  const simt::Config& c = simt::config;
  return {c.multiprocessors,
          c.shared_per_multiprocessor,
          c.shared_per_block,
          c.shared_reserved,
          c.registers_per_multiprocessor,
          c.threads_per_multiprocessor,
          c.cooperative,
          c.cluster,
          c.bytes_per_microsecond,
          c.merged_at_once};
}

inline int current_device() { return int(simt::config.device); }

constexpr bool spares_registers = false;
constexpr bool has_clusters = true;

inline int opaque(int x) { return x; }

// ---- memory --------------------------------------------------------------------------------------------------------

template <class T>
T load(const T* p, SIMT_WHERE) {
  static_assert(sizeof(T) == 2 || (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>), "__ldg has no other types");
  simt::note_global(p, sizeof(T), simt::Access::read_only, where);
  return *p;
}
template <class T>
T load_last(const T* p, SIMT_WHERE) {
  simt::note_global(p, sizeof(T), simt::Access::read, where);
  return *p;
}
template <class T>
void store(T* p, T value, SIMT_WHERE) {
  simt::note_global(p, sizeof(T), simt::Access::write, where);
  *p = value;
}
inline Bytes16 load16(const void* p, SIMT_WHERE) {
  simt::note_global(p, 16, simt::Access::read_only, where);
  return *static_cast<const Bytes16*>(p);
}
inline Bytes16 load16_last(const void* p, SIMT_WHERE) {
  simt::note_global(p, 16, simt::Access::read, where);
  return *static_cast<const Bytes16*>(p);
}
inline void store16(void* p, const Bytes16& v, SIMT_WHERE) {
  simt::note_global(p, 16, simt::Access::write, where);
  *static_cast<Bytes16*>(p) = v;
}
inline Bytes16 shared_load16(const void* p, SIMT_WHERE) {
  simt::check_shared(p, 16, where);
  simt::check_copied(p, 16, where);
  return *static_cast<const Bytes16*>(p);
}
inline void shared_store16(void* p, const Bytes16& v, SIMT_WHERE) {
  simt::check_shared(p, 16, where);
  *static_cast<Bytes16*>(p) = v;
}

inline void copy16(void* shared, const void* global, SIMT_WHERE) { simt::start_copy(shared, global, where); }
inline void copy16_fresh(void* shared, const void* global, SIMT_WHERE) {
  simt::note_fresh(global, 16, where);
  simt::start_copy(shared, global, where);
}
inline void copies_commit() { simt::commit_copies(); }
template <int n>
void copies_done() {
  simt::finish_copies(n);
}

inline void prefetch(const void* p, SIMT_WHERE) { simt::check_alignment(p, 1, where); }

inline double rounded_product(double a, double b) { return a * b; }

// ---- blocks that talk to each other --------------------------------------------------------------------------------

inline void fence(SIMT_WHERE) { simt::fence(where); }
inline unsigned load_relaxed(const unsigned* p, SIMT_WHERE) {
  simt::note_atomic(p, simt::Access::read, where);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline unsigned load_acquire(const unsigned* p, SIMT_WHERE) {
  simt::note_atomic(p, simt::Access::read, where);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
template <class T>
T load_fresh(const T* p, SIMT_WHERE) {
  static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>, "__ldcg has no other types");
  simt::note_fresh(p, sizeof(T), where);
  return *p;
}
inline unsigned add(unsigned* p, unsigned v, SIMT_WHERE) {
  simt::note_atomic(p, simt::Access::write, where);
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned increment_until(unsigned* p, unsigned last, SIMT_WHERE) {
  simt::note_atomic(p, simt::Access::write, where);
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline void add_release(unsigned* p, unsigned v, SIMT_WHERE) {
  simt::fence(where);
  simt::note_atomic(p, simt::Access::write, where);
  __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned take_ticket(unsigned* p, unsigned last, SIMT_WHERE) {
  simt::fence(where);
  const unsigned old = increment_until(p, last, where);
  simt::fence(where);
  return old;
}
inline void cluster_arrive(SIMT_WHERE) { simt::cluster_arrive(where); }
inline void cluster_wait(SIMT_WHERE) { simt::cluster_wait(where); }
inline Bytes16 cluster_load16(const void* p, unsigned rank, SIMT_WHERE) {
  simt::check_shared(p, 16, where);
  return *reinterpret_cast<const Bytes16*>(simt::in_cluster(p, rank, where));
}
template <class Done>
void wait_until(Done&& done, SIMT_WHERE) {
  while (!done()) simt::polled(where);
  simt::polled_well();
}
inline void sleep_nanoseconds(int64_t, SIMT_WHERE) {
  simt::Quiet quiet;
  simt::leave(simt::State::ready, "sleep_nanoseconds", where);
}

}  // namespace fastbn::cuda
