// In: the GPU at hand. Out: JSON lines: what it can do, in the figures that csrc/cuda/plan.cpp counts on.
//
// No torch and nothing of fastbn: probe.py compiles and runs it. Usage: probe [--limit SECONDS] [NUMBER ...]
//   1 bandwidth against bytes in flight and active multiprocessors   2 what a launch costs; copies of ResNet-50's sizes
//   3 barriers between blocks, idle and beside a copy; clusters      4 load a slice, meet, store it: no arithmetic
//   5 the same as a ring, meeting for the next slice meanwhile       6 reductions out of shared memory
//   7 reading backwards what was just read                           8 short runs and narrow strips
//   9 what 4 gives for the shapes that whole kernels are compared on
//
// Cold unless it says otherwise: launches rotate through memory many times larger than the second-level cache, and
// the data is random bits. A launch is timed by events around many of them, queued while the GPU is kept waiting, so
// that the speed of the host does not count. "us" is the median a launch; "low" and "high" are the quartiles.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define CHECK(call) check((call), #call, __LINE__)

static void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "probe.cu:%d: %s: %s\n", line, what, cudaGetErrorString(error));
  exit(1);
}

// ---- device: the few instructions that CUDA C++ has no words for ---------------------------------------------------

#define D_INLINE static __device__ __forceinline__

D_INLINE unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

D_INLINE void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
D_INLINE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
D_INLINE void wait_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

D_INLINE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
D_INLINE unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
D_INLINE void sleep_for(unsigned ns) {
  const unsigned long long start = nanoseconds();
  while (ns != 0 && nanoseconds() - start < ns) {
  }
}

// A barrier in two halves, for one thread of each of the blocks that share a counter.
D_INLINE void arrive(unsigned* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}
D_INLINE void wait_for(const unsigned* counter, unsigned target) {
  while (load_acquire(counter) < target) {
  }
}

// A value that the compiler cannot know to be unused; it never is the one that is stored.
D_INLINE void keep(uint4* out, const uint4& v) {
  if (v.x == 0x12345678 && v.y == 0x9abcdef0 && v.z == 0x0fedcba9 && v.w == 0x87654321) *out = v;
}
D_INLINE void mix(uint4& sum, const uint4& v) { sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w; }

__global__ void spin(unsigned ns) { sleep_for(ns); }
__global__ void empty() {}
__global__ void empty_dependent() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__global__ void fill(uint4* p, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t a = (uint64_t(i) + 1) * 0x9e3779b97f4a7c15ull, b = a ^ (a >> 29);
    b *= 0xbf58476d1ce4e5b9ull;
    // the exponents of bfloat16 stay between 2^-31 and 2, so that sums are ordinary numbers
    const auto half = [](uint64_t bits) { return unsigned(bits & 0xaf7faf7f) | 0x20002000u; };
    p[i] = make_uint4(half(a), half(a >> 32), half(b), half(b >> 32));
  }
}

// ---- 1: copies and reads with so many bytes in flight --------------------------------------------------------------
// `n` is a number of 16-byte vectors, of which a block takes threads * (what it keeps in flight) at a time.

template <int kLoads, bool kWrite>
__global__ void __launch_bounds__(1024) stream_plain(uint4* out, const uint4* in, int64_t n) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kLoads;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x * kLoads + threadIdx.x; i < n; i += step) {
    uint4 v[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) v[k] = __ldcs(in + i + k * blockDim.x);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (kWrite)
        __stcs(out + i + k * blockDim.x, v[k]);
      else
        mix(sum, v[k]);
    }
  }
  if (!kWrite) keep(out, sum);
}

template <int kDepth, bool kWrite>
__global__ void __launch_bounds__(512) stream_async(uint4* out, const uint4* in, int64_t n) {
  extern __shared__ uint4 ring[];
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (first + d * step < n) copy16(ring + d * blockDim.x + threadIdx.x, in + first + d * step);
    commit();
  }
  int slot = 0;
  for (int64_t i = first; i < n; i += step) {
    wait_all_but<kDepth - 1>();  // a thread reads only what it copied itself: nobody else need wait
    const uint4 v = ring[slot * blockDim.x + threadIdx.x];
    if (kWrite)
      __stcs(out + i, v);
    else
      mix(sum, v);
    if (i + kDepth * step < n) copy16(ring + slot * blockDim.x + threadIdx.x, in + i + kDepth * step);
    commit();
    slot = slot + 1 == kDepth ? 0 : slot + 1;
  }
  if (!kWrite) keep(out, sum);
}

template <int kDepth, bool kWrite>
__global__ void __launch_bounds__(512) stream_bulk(uint4* out, const uint4* in, int64_t n) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 ring[];
  __shared__ __align__(8) uint64_t full[kDepth];
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x;
  const unsigned bytes = blockDim.x * 16;
  const auto fetch = [&](int slot, int64_t from) {
    if (from >= n) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(full + slot)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(ring + slot * blockDim.x)),
                 "l"(in + from), "r"(bytes), "r"(shared_address(full + slot))
                 : "memory");
  };
  if (threadIdx.x == 0) {
    for (int d = 0; d < kDepth; ++d)
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(full + d)) : "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int d = 0; d < kDepth; ++d) fetch(d, first + d * step);
  }
  __syncthreads();
  int slot = 0;
  unsigned phase = 0;
  for (int64_t i = first; i < n; i += step) {
    unsigned done = 0;
    while (done == 0) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(full + slot)), "r"(phase)
                   : "memory");
    }
    const uint4 v = ring[slot * blockDim.x + threadIdx.x];
    if (kWrite)
      __stcs(out + i + threadIdx.x, v);
    else
      mix(sum, v);
    __syncthreads();  // everybody has read the slot
    if (threadIdx.x == 0) fetch(slot, i + kDepth * step);
    if (++slot == kDepth) slot = 0, phase ^= 1;
  }
  if (!kWrite) keep(out, sum);
#endif
}

// What a library's copy does: a block for each 32 KB, nothing persistent.
__global__ void __launch_bounds__(256) copy_once(uint4* out, const uint4* in, int64_t n) {
  const int64_t first = int64_t(blockIdx.x) * 2048 + threadIdx.x;
  uint4 v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k * 256 < n) v[k] = __ldcs(in + first + k * 256);
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k * 256 < n) __stcs(out + first + k * 256, v[k]);
}

// ---- 3: barriers ---------------------------------------------------------------------------------------------------

constexpr int kLine = 32;  // counters lie this many words apart: a cache line each

struct Exchange {
  unsigned* counters;
  double* moments;  // 4 for each block
  int blocks;       // of a group; 0: no barrier
  int rounds;
  bool merge;  // every block leaves 24 bytes and reads those of its group, as moments are merged
};

// The first `members` blocks meet in groups; the others copy until the first are done.
__global__ void __launch_bounds__(256)
    meet(Exchange e, int members, unsigned* done, unsigned long long* copied, uint4* out, const uint4* in, int64_t n) {
  if (int(blockIdx.x) < members) {
    const int group = int(blockIdx.x) / e.blocks, first = group * e.blocks;
    double sum = 0;
    for (int r = 0; r < e.rounds; ++r) {
      double* const moments = e.moments + (r & 1) * 4 * gridDim.x;
      if (e.merge && threadIdx.x < 3) moments[4 * blockIdx.x + threadIdx.x] = sum + threadIdx.x;
      __syncthreads();
      if (threadIdx.x == 0) {
        arrive(e.counters + group * kLine);
        wait_for(e.counters + group * kLine, unsigned(r + 1) * e.blocks);
      }
      __syncthreads();
      if (e.merge)
        for (int b = threadIdx.x; b < 3 * e.blocks; b += blockDim.x)
          sum += __ldcg(moments + 4 * (first + b / 3) + b % 3) * 1e-9;
    }
    if (sum == 12345) e.moments[0] = sum;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(done, 1);
    return;
  }
  const int64_t step = int64_t(gridDim.x - members) * 2048;
  int64_t at = int64_t(blockIdx.x - members) * 2048 + threadIdx.x;
  unsigned long long vectors = 0;
  while (load_acquire(done) < unsigned(members)) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(in + at + k * 256);
#pragma unroll
    for (int k = 0; k < 8; ++k) __stcs(out + at + k * 256, v[k]);
    vectors += 8;
    at = at + step + 2048 <= n ? at + step : int64_t(blockIdx.x - members) * 2048 + threadIdx.x;
  }
  atomicAdd(copied, vectors * 16);
}

__global__ void __launch_bounds__(256) meet_cluster(int rounds) {
#if __CUDA_ARCH__ >= 900
  for (int r = 0; r < rounds; ++r) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

// ---- 4, 5, 8, 9: the resident kernel without its arithmetic --------------------------------------------------------

// An item is `rows` runs of `run` vectors each, `stride` vectors apart; item i begins i * run vectors after item 0.
struct Pattern {
  int rows, run, items;
  int64_t stride;
};

struct Geometry {
  int blocks, groups, slice;  // blocks of a group; groups; vectors of an item that one block takes
};

enum Mode { kRead = 1, kWrite = 2 };

constexpr int kThreads = 256;

// The vectors of a slice that a thread moves, in steps without a division.
struct Cursor {
  int64_t at;
  int column;
  const Pattern w;
  const int step_rows, step_columns;
  __device__ Cursor(const Pattern& pattern, int item, int vector)
      : column(vector % pattern.run),
        w(pattern),
        step_rows(kThreads / pattern.run),
        step_columns(kThreads % pattern.run) {
    at = vector / pattern.run * pattern.stride + int64_t(item) * pattern.run + column;
  }
  __device__ void next() {
    at += step_rows * w.stride + step_columns;
    column += step_columns;
    if (column >= w.run) column -= w.run, at += w.stride - w.run;
  }
};

template <int kDepth>
D_INLINE void load_slice(uint4* slot, const uint4* in, const Pattern& w, int item, int first, int count) {
  Cursor c(w, item, first + threadIdx.x);
  for (int i = threadIdx.x; i < count; i += kThreads, c.next()) {
    copy16(slot + i, in + c.at);
    if (kDepth > 0) {
      commit();
      wait_all_but<(kDepth > 0 ? kDepth - 1 : 0)>();
    }
  }
}
D_INLINE void store_slice(uint4* out, const uint4* slot, const Pattern& w, int item, int first, int count) {
  Cursor c(w, item, first + threadIdx.x);
  for (int i = threadIdx.x; i < count; i += kThreads, c.next()) __stcs(out + c.at, slot[i]);
}

// kDepth pieces of 4 KB in flight.
template <int kDepth>
__global__ void __launch_bounds__(kThreads)
    skeleton(uint4* out, const uint4* in, Pattern w, Geometry g, unsigned* counters, unsigned stagger, int layer_size,
             int mode, bool barrier) {
  extern __shared__ uint4 slot[];
  const int group = int(blockIdx.x) / g.blocks, first = int(blockIdx.x) % g.blocks * g.slice;
  if (group >= g.groups) return;
  const int count = max(0, min(g.slice, w.rows * w.run - first));
  sleep_for(blockIdx.x / layer_size * stagger);
  unsigned target = 0;
  for (int item = group; item < w.items; item += g.groups) {
    if (mode & kRead) {
      load_slice<kDepth>(slot, in, w, item, first, count);
      commit();
      wait_all_but<0>();
    }
    if (barrier && g.blocks > 1) {
      target += g.blocks;
      __syncthreads();
      if (threadIdx.x == 0) {
        arrive(counters + group * kLine);
        wait_for(counters + group * kLine, target);
      }
      __syncthreads();
    } else if (barrier) {
      __syncthreads();
    }
    if (mode & kWrite) store_slice(out, slot, w, item, first, count);
  }
}

// Three slots: one is stored, one is complete and announced, one is on its way.
__global__ void __launch_bounds__(kThreads)
    ring_skeleton(uint4* out, const uint4* in, Pattern w, Geometry g, unsigned* counters) {
  extern __shared__ uint4 slot[];
  const int group = int(blockIdx.x) / g.blocks, first = int(blockIdx.x) % g.blocks * g.slice;
  if (group >= g.groups) return;
  const int count = max(0, min(g.slice, w.rows * w.run - first));
  const int waves = (w.items - group + g.groups - 1) / g.groups;
  const auto load = [&](int k) {
    if (k < waves) load_slice<0>(slot + k % 3 * g.slice, in, w, group + k * g.groups, first, count);
    commit();
  };
  // One counter for even and one for odd waves: nobody arrives for wave k + 2 before all have arrived for wave k.
  const auto counter = [&](int k) { return counters + (2 * group + k % 2) * kLine; };
  load(0);
  load(1);
  wait_all_but<1>();
  __syncthreads();
  if (threadIdx.x == 0) arrive(counter(0));
  for (int k = 0; k < waves; ++k) {
    load(k + 2);
    wait_all_but<1>();
    __syncthreads();
    if (threadIdx.x == 0) {
      if (k + 1 < waves) arrive(counter(k + 1));
      wait_for(counter(k), unsigned(k / 2 + 1) * g.blocks);
    }
    __syncthreads();
    store_slice(out, slot + k % 3 * g.slice, w, group + k * g.groups, first, count);
  }
}

// ---- 6: reductions out of shared memory ----------------------------------------------------------------------------

struct Sums {
  float n, mean, m2;
};
D_INLINE Sums merge(const Sums& a, const Sums& b) {
  const float n = a.n + b.n, delta = b.mean - a.mean, part = __fdividef(b.n, n);
  return {n, a.mean + delta * part, a.m2 + b.m2 + delta * delta * a.n * part};
}

template <class T, class Merge>
D_INLINE T block_reduce(T value, T* shared, Merge merge_two) {
  const auto from = [](T v, int lane) {
    T got;
    const auto* words = reinterpret_cast<const float*>(&v);
    auto* other = reinterpret_cast<float*>(&got);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); ++i) other[i] = __shfl_xor_sync(~0u, words[i], lane);
    return got;
  };
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = merge_two(value, from(value, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) value = merge_two(value, shared[i]);
  return value;
}

D_INLINE void widen(const uint4& v, float* x) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

enum Reduction { kTwoPass, kPieces, kTail };

// `rounds` times over the same `vectors` of bfloat16, so that the difference of two launches is their time.
__global__ void __launch_bounds__(kThreads) reduce(float* out, const uint4* in, int vectors, int rounds, int how) {
  extern __shared__ uint4 slot[];
  __shared__ float one[kThreads / 32];
  __shared__ Sums three[kThreads / 32];
  for (int i = threadIdx.x; i < vectors; i += kThreads) slot[i] = in[i];
  __syncthreads();
  const auto add = [](float a, float b) { return a + b; };
  float result = 0;
  for (int r = 0; r < rounds; ++r) {
    asm volatile("" ::: "memory");  // read it again
    if (how == kTwoPass) {
      float sum = 0, squares = 0, x[8];
      for (int i = threadIdx.x; i < vectors; i += kThreads) {
        widen(slot[i], x);
        sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
      const float mean = block_reduce(sum, one, add) / float(vectors * 8);
      for (int i = threadIdx.x; i < vectors; i += kThreads) {
        widen(slot[i], x);
#pragma unroll
        for (int k = 0; k < 8; ++k) squares += (x[k] - mean) * (x[k] - mean);
      }
      result += mean + block_reduce(squares, one, add);
    } else {
      // each vector exactly, then merged: what is possible while later pieces are still on their way
      Sums sums{0, 0, 0};
      float x[8];
      const int end = how == kTail ? kThreads : vectors;
      for (int i = threadIdx.x; i < end; i += kThreads) {
        widen(slot[i], x);
        Sums piece{8, (((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))) / 8, 0};
#pragma unroll
        for (int k = 0; k < 8; ++k) piece.m2 += (x[k] - piece.mean) * (x[k] - piece.mean);
        sums = sums.n == 0 ? piece : merge(sums, piece);
      }
      const Sums all = block_reduce(sums, three, [](const Sums& a, const Sums& b) { return merge(a, b); });
      result += all.mean + all.m2;
    }
  }
  if (result == 12345) *out = result;
}

// ---- 7: reading again ----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256) read_once(uint4* out, const uint4* in, int64_t n) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t first = int64_t(blockIdx.x) * 2048 + threadIdx.x;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k * 256 < n) mix(sum, __ldg(in + first + k * 256));
  keep(out, sum);
}

__global__ void __launch_bounds__(256)
    copy_again(uint4* out, const uint4* in, int64_t n, bool reverse, bool first_out) {
  const int64_t block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x, first = block * 2048 + threadIdx.x;
  uint4 v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k * 256 < n) v[k] = __ldcs(in + first + k * 256);
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (first + k * 256 < n) {
      if (first_out)
        __stcs(out + first + k * 256, v[k]);
      else
        out[first + k * 256] = v[k];
    }
}

// ---- host: records, memory, timing ---------------------------------------------------------------------------------

struct Times {
  double median, low, high;  // microseconds
};

// One JSON line; written when it goes out of scope.
class Record {
 public:
  Record(int measurement, const char* name) {
    text_ = format("{\"measurement\": %d, \"name\": \"%s\"", measurement, name);
  }
  ~Record() {
    printf("%s}\n", text_.c_str());
    fflush(stdout);
  }
  Record& add(const char* key, int64_t value) { return append(key, format("%lld", static_cast<long long>(value))); }
  Record& add(const char* key, int value) { return add(key, int64_t(value)); }
  Record& add(const char* key, double value) { return append(key, format("%.5g", value)); }
  Record& add(const char* key, const char* value) { return append(key, format("\"%s\"", value)); }
  Record& add(const char* key, bool value) { return append(key, value ? "true" : "false"); }
  // bytes: that pass between chip and memory in the time
  Record& add(const Times& t, double bytes = 0) {
    add("us", t.median).add("low", t.low).add("high", t.high);
    return bytes > 0 ? add("bytes", bytes).add("gbs", bytes / t.median * 1e-3) : *this;
  }

 private:
  template <class... A>
  static std::string format(const char* how, A... args) {
    char line[512];
    snprintf(line, sizeof line, how, args...);
    return line;
  }
  Record& append(const char* key, const std::string& value) {
    text_ += std::string(", \"") + key + "\": " + value;
    return *this;
  }
  std::string text_;
};

struct Gpu {
  cudaDeviceProp props;
  int sms, shared;  // multiprocessors; bytes of shared memory that blocks of one can use together
  uint4 *in, *out;  // pools to rotate through
  int64_t pool;     // vectors in each
  int64_t at = 0;
  unsigned* counters;  // zeros when a sample of launches begins
  int64_t counters_used = 0;
  static constexpr int64_t counter_words = 1 << 20;
  cudaStream_t stream;

  // Where the next launch finds (and leaves) so many vectors that the cache has forgotten.
  int64_t next(int64_t vectors) {
    if (at + vectors > pool) at = 0;
    const int64_t here = at;
    at += (vectors + 65535) / 65536 * 65536;
    return here;
  }
  // Zeros that no other launch of the sample uses.
  unsigned* fresh_counters(int64_t words) {
    unsigned* const here = counters + counters_used;
    counters_used += words;
    if (counters_used > counter_words) fprintf(stderr, "probe: too few counters\n"), exit(1);
    return here;
  }
  void reset_counters() {
    if (counters_used != 0) CHECK(cudaMemsetAsync(counters, 0, size_t(counters_used) * 4, stream));
    counters_used = 0;
  }
  bool hopper() const { return props.major >= 9; }
};
static Gpu gpu;

static Times quartiles(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return {v[n / 2], v[n / 4], v[(3 * n) / 4]};
}

// Microseconds a call of body(), which queues one launch. With graph, `launches` of them are captured once and
// replayed.
template <class Body>
Times timed(int launches, int samples, bool graph, Body body) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  cudaGraphExec_t replay = nullptr;
  gpu.reset_counters();
  body();  // loads the kernel, which a capture must not
  CHECK(cudaStreamSynchronize(gpu.stream));
  if (graph) {
    cudaGraph_t captured;
    gpu.counters_used *= launches;
    CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
    gpu.reset_counters();
    for (int i = 0; i < launches; ++i) body();
    CHECK(cudaStreamEndCapture(gpu.stream, &captured));
    CHECK(cudaGraphInstantiate(&replay, captured, 0));
    CHECK(cudaGraphDestroy(captured));
  }
  std::vector<double> values;
  for (int s = -2; s < samples; ++s) {
    if (!graph) gpu.reset_counters();
    spin<<<1, 1, 0, gpu.stream>>>(graph ? 20000 : unsigned(std::min(4000, 30 + 6 * launches)) * 1000);
    CHECK(cudaEventRecord(start, gpu.stream));
    if (graph)
      CHECK(cudaGraphLaunch(replay, gpu.stream));
    else
      for (int i = 0; i < launches; ++i) body();
    CHECK(cudaEventRecord(stop, gpu.stream));
    CHECK(cudaStreamSynchronize(gpu.stream));
    CHECK(cudaGetLastError());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (s >= 0) values.push_back(ms * 1e3 / launches);
  }
  if (replay != nullptr) CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  return quartiles(values);
}

// The time of one round, from launches of many and of few; body(rounds).
template <class Body>
Times timed_rounds(int few, int many, int samples, Body body) {
  const Times a = timed(1, samples, false, [&] { body(few); });
  const Times b = timed(1, samples, false, [&] { body(many); });
  const double n = many - few;
  return {(b.median - a.median) / n, (b.low - a.median) / n, (b.high - a.median) / n};
}

enum Attribute { kPlain, kCooperative, kDependent, kCluster };

template <class... P, class... A>
void launch(Attribute how, int cluster, int blocks, int threads, int64_t shared, void (*kernel)(P...), A... args) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = gpu.stream;
  config.attrs = &attribute;
  config.numAttrs = how == kPlain ? 0 : 1;
  if (how == kCooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (how == kDependent) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else if (how == kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

template <class... P>
void allow_shared(void (*kernel)(P...), int64_t bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// So many launches to capture that a replay goes through at least four times the cache.
static int launches_for(double bytes) { return int(std::clamp(4.0 * gpu.props.l2CacheSize / bytes, 5.0, 200.0)); }

// f(depth) with the depth as a constant
template <class F>
void with_depth(int depth, F f) {
  switch (depth) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    default:
      fprintf(stderr, "probe: no kernel of depth %d\n", depth), exit(1);
  }
}

// ---- the measurements ----------------------------------------------------------------------------------------------

using Stream = void (*)(uint4*, const uint4*, int64_t);

static void bandwidth_of(const char* loads, Stream kernel, bool write, int threads, int per_thread, int64_t shared,
                         int blocks) {
  if (shared > 0) allow_shared(kernel, shared);
  const int64_t unit = int64_t(blocks) * threads * per_thread;
  const int64_t n = (int64_t(128) << 20) / 16 / unit * unit;
  const Times t = timed(2, 7, false, [&] {
    const int64_t at = gpu.next(n);
    launch(kPlain, 1, blocks, threads, shared, kernel, gpu.out + at, gpu.in + at, n);
  });
  Record(1, write ? "copy" : "read")
      .add("loads", loads)
      .add("kb_in_flight", int(shared > 0 ? shared / 1024 : threads * per_thread / 64))
      .add("multiprocessors", blocks)
      .add(t, double(n) * 16 * (write ? 2 : 1));
}

static void bandwidth() {
  std::vector<int> counts;
  for (int count : {16, 32, 64, 96})
    if (count < gpu.sms) counts.push_back(count);
  counts.push_back(gpu.sms);
  for (int blocks : counts) {
    const bool all = blocks == gpu.sms || blocks == 64;
    for (int depth : {1, 2, 4, 8, 16}) {  // times 8 KB
      with_depth(depth, [&](auto d) {
        constexpr int kDepth = decltype(d)::value;
        if constexpr (kDepth <= 16) {
          const int64_t shared = int64_t(kDepth) * 8192;
          if (shared > gpu.shared) return;
          bandwidth_of("cp.async", stream_async<kDepth, false>, false, 512, 1, shared, blocks);
          bandwidth_of("cp.async", stream_async<kDepth, true>, true, 512, 1, shared, blocks);
          if (all && gpu.hopper()) {
            bandwidth_of("bulk", stream_bulk<kDepth, false>, false, 512, 1, shared, blocks);
            bandwidth_of("bulk", stream_bulk<kDepth, true>, true, 512, 1, shared, blocks);
          }
        }
        if constexpr (kDepth <= 8) {
          if (!all) return;
          // 16 KB times the depth, which reach 128 KB with 1024 threads; 8 KB with half of them
          bandwidth_of("plain", stream_plain<kDepth, false>, false, 1024, kDepth, 0, blocks);
          bandwidth_of("plain", stream_plain<kDepth, true>, true, 1024, kDepth, 0, blocks);
          if (kDepth > 1) return;
          bandwidth_of("plain", stream_plain<kDepth, false>, false, 512, kDepth, 0, blocks);
          bandwidth_of("plain", stream_plain<kDepth, true>, true, 512, kDepth, 0, blocks);
        }
      });
    }
  }
  if (!gpu.hopper()) Record(1, "copy").add("loads", "bulk").add("skipped", "needs compute capability 9.0");
  const int64_t n = (int64_t(1) << 30) / 16;
  const Times once = timed(2, 9, false, [&] {
    const int64_t at = gpu.next(n);
    copy_once<<<unsigned(n / 2048), 256, 0, gpu.stream>>>(gpu.out + at, gpu.in + at, n);
  });
  Record(1, "big copy").add("by", "kernel, not persistent").add(once, double(n) * 32);
  const Times library = timed(2, 9, false, [&] {
    const int64_t at = gpu.next(n);
    CHECK(cudaMemcpyAsync(gpu.out + at, gpu.in + at, size_t(n) * 16, cudaMemcpyDeviceToDevice, gpu.stream));
  });
  Record(1, "big copy").add("by", "cudaMemcpyAsync").add(library, double(n) * 32);
}

static void launches() {
  const int blocks = 2 * gpu.sms, threads = 256;
  for (bool graph : {false, true}) {
    const auto measure = [&](const char* kind, auto body) {
      Record(2, "empty kernel").add("launch", kind).add("graph", graph).add(timed(100, 15, graph, body));
    };
    measure("plain", [&] { launch(kPlain, 1, blocks, threads, 0, empty); });
    measure("cooperative", [&] { launch(kCooperative, 1, blocks, threads, 0, empty); });
    if (gpu.hopper()) {
      measure("dependent", [&] { launch(kDependent, 1, blocks, threads, 0, empty_dependent); });
      measure("cluster of 8", [&] { launch(kCluster, 8, blocks / 8 * 8, threads, 0, empty); });
    } else {
      Record(2, "empty kernel").add("launch", "dependent").add("skipped", "needs compute capability 9.0");
    }
  }
  // ResNet-50's sizes at batch 32, 128, 256: values of a sample, twice as many bytes
  std::vector<int64_t> sizes;
  for (int64_t batch : {32, 128, 256})
    for (int64_t values : {802816, 200704, 401408, 100352, 50176, 25088})
      for (int64_t itemsize : {2, 4}) sizes.push_back(batch * values * itemsize);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  for (int64_t bytes : sizes) {
    const int64_t n = bytes / 16;
    const int count = launches_for(double(bytes));
    const auto measure = [&](const char* kind, int how_many, bool graph) {
      const Times t = timed(how_many, 9, graph, [&] {
        const int64_t at = gpu.next(n);
        copy_once<<<unsigned((n + 2047) / 2048), 256, 0, gpu.stream>>>(gpu.out + at, gpu.in + at, n);
      });
      Record(2, "copy").add("launch", kind).add("tensor_bytes", bytes).add(t, 2.0 * double(bytes));
    };
    measure("in a graph", count, true);
    measure("alone", 1, false);
  }
}

static void barriers() {
  unsigned long long* copied = nullptr;
  const int64_t n = std::min<int64_t>(gpu.pool, (int64_t(1) << 30) / 16);
  for (bool loaded : {false, true}) {
    // loaded: one block a multiprocessor meets and one copies
    const int blocks = 2 * gpu.sms, most = loaded ? gpu.sms : blocks;
    for (int P : {2, 4, 8, 16, 31, 61, 132, 264}) {
      if (P > most) continue;
      for (bool merge : {false, true}) {
        const int members = most / P * P, grid = loaded ? blocks : members;
        const auto body = [&](int rounds) {
          // a line for each group, one for `done`, one for `copied`, and the moments of two rounds
          unsigned* const lines = gpu.fresh_counters((members / P + 2) * kLine + 16 * grid);
          unsigned* const done = lines + members / P * kLine;
          copied = reinterpret_cast<unsigned long long*>(done + kLine);
          const Exchange e{lines, reinterpret_cast<double*>(done + 2 * kLine), P, rounds, merge};
          launch(kCooperative, 1, grid, 256, 0, meet, e, members, done, copied, gpu.out, gpu.in, n);
        };
        const Times t = timed_rounds(50, 450, 7, body);
        Record record(3, "group barrier");
        record.add("blocks", P).add("groups", members / P).add("beside_a_copy", loaded).add("exchange", merge).add(t);
        if (loaded) {
          unsigned long long bytes = 0;
          CHECK(cudaMemcpy(&bytes, copied, sizeof bytes, cudaMemcpyDeviceToHost));
          record.add("copy_gbs", 2 * double(bytes) / (t.median * 450) * 1e-3);
        }
      }
    }
  }
  if (!gpu.hopper()) {
    Record(3, "cluster barrier").add("skipped", "needs compute capability 9.0");
    return;
  }
  CHECK(cudaFuncSetAttribute(meet_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int cluster : {2, 4, 8, 16}) {
    for (int64_t shared : {int64_t(0), int64_t(52) << 10, int64_t(104) << 10, int64_t(208) << 10}) {
      allow_shared(meet_cluster, shared);
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(gpu.sms / cluster * cluster);
      config.blockDim = dim3(256);
      config.dynamicSmemBytes = size_t(shared);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int active = 0;
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&active, meet_cluster, &config);
      Record record(3, "active clusters");
      record.add("blocks", cluster).add("shared_kb", shared / 1024);
      if (error != cudaSuccess)
        record.add("skipped", cudaGetErrorString(error)), cudaGetLastError();
      else
        record.add("clusters", active);
      if (shared > 0 || error != cudaSuccess || active == 0) continue;
      const Times t = timed_rounds(100, 1100, 7, [&](int rounds) {
        launch(kCluster, cluster, gpu.sms / cluster * cluster, 256, 0, meet_cluster, rounds);
      });
      Record(3, "cluster barrier").add("blocks", cluster).add(t);
    }
  }
}

// A channels_first tensor of bfloat16 whose items are `channels` neighbouring channels.
static Pattern channels_first(int batch, int channels, int side, int together) {
  const int run = together * side * side / 8;
  return {batch, run, channels / together, int64_t(channels) * side * side / 8};
}

// GPU_PLAN's rule for the width of groups: even waves first, then groups as wide as that allows.
static Geometry geometry(const Pattern& w, int resident, int64_t slot_bytes) {
  const int64_t item = int64_t(w.rows) * w.run;
  const int least = int((item * 16 + slot_bytes - 1) / slot_bytes);
  const int most = std::max(1, resident / least);
  Geometry best{};
  double best_score = 0;
  const int waves = (w.items + most - 1) / most;
  for (int candidate : {waves, waves + 1}) {
    const int groups = (w.items + candidate - 1) / candidate;
    const int real = (w.items + groups - 1) / groups;
    const int blocks = resident / groups;
    const double score = double(w.items) / (double(real) * groups);
    if (best_score == 0 || (best_score < 0.9 && waves < 4 && score > best_score)) {
      best = {blocks, groups, int((item + blocks - 1) / blocks)};
      best_score = score;
    }
  }
  return best;
}

struct SkeletonRun {
  int per_sm, kb_in_flight;
  bool stagger;
  int mode = kRead | kWrite;
  bool barrier = true;
};

static void skeleton_of(int number, const char* name, const char* shape, const Pattern& w, const SkeletonRun& how) {
  const int depth = std::clamp(how.kb_in_flight / how.per_sm / 4, 1, 32);
  with_depth(depth, [&](auto d) {
    const auto kernel = skeleton<decltype(d)::value>;
    const int64_t slot = gpu.shared / how.per_sm / 1024 * 1024 - 1024;  // the system takes 1 KB of each block's
    allow_shared(kernel, slot);
    int per_sm = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, size_t(slot)));
    per_sm = std::min(per_sm, how.per_sm);
    Record record(number, name);
    record.add("shape", shape).add("run_bytes", w.run * 16).add("blocks_per_sm", how.per_sm);
    record.add("kb_in_flight", depth * 4 * how.per_sm).add("stagger", how.stagger).add("barrier", how.barrier);
    record.add("mode", how.mode == (kRead | kWrite) ? "copy" : how.mode == kRead ? "read" : "write");
    if (per_sm < how.per_sm) {
      record.add("skipped", "so many blocks do not fit");
      return;
    }
    const Geometry g = geometry(w, per_sm * gpu.sms, slot);
    const int blocks = g.blocks * g.groups;
    if (int64_t(g.slice) * 16 > slot) {
      record.add("skipped", "a slice does not fit");
      return;
    }
    const int64_t n = int64_t(w.rows - 1) * w.stride + int64_t(w.items) * w.run;
    const double bytes = double(w.rows) * w.run * w.items * 16;
    // a layer's start lies a slice's time at 4.3 TB/s after the one below it
    const auto stagger = how.stagger ? unsigned(double(g.slice) * 16 * gpu.sms / 4300) : 0u;
    const Times t = timed(launches_for(bytes), 9, true, [&] {
      const int64_t at = gpu.next(n);
      launch(kCooperative, 1, blocks, kThreads, slot, kernel, gpu.out + at, gpu.in + at, w, g,
             gpu.fresh_counters(g.groups * kLine), stagger, gpu.sms, how.mode, how.barrier);
    });
    record.add("group", g.blocks).add("groups", g.groups).add("slice_bytes", g.slice * 16);
    record.add("waves", double(w.items) / g.groups);
    record.add(t, bytes * (how.mode == (kRead | kWrite) ? 2 : 1));
  });
}

struct Named {
  const char* name;
  Pattern pattern;
};

static void plain_skeletons() {
  const Named shapes[] = {{"256x56x56 N=256", channels_first(256, 256, 56, 1)},
                          {"512x28x28 N=128", channels_first(128, 512, 28, 1)},
                          {"256x14x14 N=128", channels_first(128, 256, 14, 2)}};
  for (const Named& s : shapes)
    for (int per_sm : {1, 2, 4})
      for (int kb : {32, 64, 128})
        for (bool stagger : {false, true}) {
          if (per_sm == 1 && stagger) continue;
          skeleton_of(4, "skeleton", s.name, s.pattern, {per_sm, kb, stagger});
        }
}

static void ring_skeletons() {
  const Named shapes[] = {{"256x56x56 N=256", channels_first(256, 256, 56, 1)},
                          {"512x28x28 N=128", channels_first(128, 512, 28, 1)},
                          {"256x14x14 N=128", channels_first(128, 256, 14, 2)}};
  const int64_t slot = std::min<int64_t>(64 << 10, (gpu.shared - 1024) / 3 / 128 * 128);
  allow_shared(ring_skeleton, 3 * slot);
  for (const Named& s : shapes) {
    const Geometry g = geometry(s.pattern, gpu.sms, slot);
    const int64_t n = int64_t(s.pattern.rows - 1) * s.pattern.stride + int64_t(s.pattern.items) * s.pattern.run;
    const double bytes = double(s.pattern.rows) * s.pattern.run * s.pattern.items * 16;
    Record record(5, "ring skeleton");
    record.add("shape", s.name).add("group", g.blocks).add("groups", g.groups).add("slice_bytes", g.slice * 16);
    record.add("waves", double(s.pattern.items) / g.groups);
    if (int64_t(g.slice) * 16 > slot) {
      record.add("skipped", "a slice does not fit");
      continue;
    }
    const Times t = timed(launches_for(bytes), 9, true, [&] {
      const int64_t at = gpu.next(n);
      launch(kCooperative, 1, g.blocks * g.groups, kThreads, 3 * slot, ring_skeleton, gpu.out + at, gpu.in + at,
             s.pattern, g, gpu.fresh_counters(2 * g.groups * kLine));
    });
    record.add(t, 2 * bytes);
  }
}

static void reductions() {
  const char* const names[] = {"exact, two passes", "piecewise", "last piece and block"};
  for (int per_sm : {1, 2, 4})
    for (int kb : {16, 32, 52})
      for (int how : {kTwoPass, kPieces, kTail}) {
        const int64_t shared = int64_t(kb) << 10;
        if (per_sm * (shared + 2048) > gpu.shared) continue;
        allow_shared(reduce, shared);
        const Times t = timed_rounds(20, 220, 7, [&](int rounds) {
          launch(kPlain, 1, per_sm * gpu.sms, kThreads, shared, reduce, reinterpret_cast<float*>(gpu.out), gpu.in,
                 int(shared / 16), rounds, how);
        });
        Record(6, "reduction").add("how", names[how]).add("kb", kb).add("blocks_per_sm", per_sm).add(t);
      }
}

static void rereads() {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  for (int mb : {8, 16, 24, 32, 40, 48, 60, 80}) {
    const int64_t n = (int64_t(mb) << 20) / 16;
    const auto grid = unsigned(n / 2048);
    for (int variant = 0; variant < 5; ++variant) {
      const bool cold = variant == 4, reverse = variant % 2 == 0, first_out = variant < 2;
      std::vector<double> values;
      for (int s = -2; s < 15; ++s) {
        const int64_t at = gpu.next(n), flushed = gpu.next((int64_t(256) << 20) / 16);
        copy_once<<<8192, 256, 0, gpu.stream>>>(gpu.out + flushed, gpu.in + flushed, int64_t(8192) * 2048);
        spin<<<1, 1, 0, gpu.stream>>>(40000);
        if (!cold) read_once<<<grid, 256, 0, gpu.stream>>>(gpu.out, gpu.in + at, n);
        CHECK(cudaEventRecord(start, gpu.stream));
        copy_again<<<grid, 256, 0, gpu.stream>>>(gpu.out + at, gpu.in + at, n, reverse, first_out || cold);
        CHECK(cudaEventRecord(stop, gpu.stream));
        CHECK(cudaStreamSynchronize(gpu.stream));
        CHECK(cudaGetLastError());
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (s >= 0) values.push_back(ms * 1e3);
      }
      Record(7, cold ? "copy, cold" : "copy of what was just read")
          .add("mb", mb)
          .add("reverse", reverse)
          .add("evict_first_stores", first_out || cold)
          .add(quartiles(values), double(n) * 32);
    }
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
}

static void runs() {
  // the matrix of 512x28x28 N=128 in bfloat16, channels_last: 100352 rows of 1024 bytes, in strips
  for (int mode : {int(kRead), int(kWrite), kRead | kWrite}) {
    for (int bytes : {32, 64, 128, 256})
      skeleton_of(8, "strips", "512x28x28 N=128 channels_last", {128 * 28 * 28, bytes / 16, 1024 / bytes, 64},
                  {4, 128, false, mode, false});
    skeleton_of(8, "contiguous", "2048 times 50 KB", {1, 3136, 2048, 3136}, {4, 128, false, mode, false});
  }
  const Named shapes[] = {{"256x14x14 N=256, 2 together", channels_first(256, 256, 14, 2)},
                          {"256x14x14 N=256, 4 together", channels_first(256, 256, 14, 4)},
                          {"1024x14x14 N=128, 2 together", channels_first(128, 1024, 14, 2)},
                          {"1024x14x14 N=128, 4 together", channels_first(128, 1024, 14, 4)},
                          {"2048x7x7 N=256, 8 together", channels_first(256, 2048, 7, 8)},
                          {"2048x7x7 N=256, 16 together", channels_first(256, 2048, 7, 16)},
                          {"512x28x28 N=128", channels_first(128, 512, 28, 1)},
                          {"256x56x56 N=128", channels_first(128, 256, 56, 1)}};
  for (const Named& s : shapes)
    for (int mode : {int(kRead), int(kWrite), kRead | kWrite})
      skeleton_of(8, "runs", s.name, s.pattern, {4, 128, false, mode, false});
}

static void for_comparison() {
  const Named shapes[] = {{"256x56x56 N=32", channels_first(32, 256, 56, 1)},
                          {"256x56x56 N=256", channels_first(256, 256, 56, 1)},
                          {"512x7x7 N=32", channels_first(32, 512, 7, 8)},
                          {"512x7x7 N=256", channels_first(256, 512, 7, 8)}};
  for (const Named& s : shapes)
    for (int per_sm : {2, 4}) skeleton_of(9, "skeleton", s.name, s.pattern, {per_sm, 128, true});
}

static void prepare() {
  CHECK(cudaSetDevice(0));
  CHECK(cudaGetDeviceProperties(&gpu.props, 0));
  CHECK(cudaStreamCreate(&gpu.stream));
  gpu.sms = gpu.props.multiProcessorCount;
  gpu.shared = int(gpu.props.sharedMemPerMultiprocessor) - 1024;
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  gpu.pool = int64_t(std::min<size_t>(free / 3, size_t(4) << 30)) / (1 << 20) * (1 << 20) / 16;
  CHECK(cudaMalloc(&gpu.in, size_t(gpu.pool) * 16));
  CHECK(cudaMalloc(&gpu.out, size_t(gpu.pool) * 16));
  CHECK(cudaMalloc(&gpu.counters, Gpu::counter_words * 4));
  CHECK(cudaMemset(gpu.counters, 0, Gpu::counter_words * 4));
  if (gpu.pool < (int64_t(1) << 30) / 16) fprintf(stderr, "probe: needs 4 GB of free memory\n"), exit(1);
  fill<<<4 * gpu.sms, 512, 0, gpu.stream>>>(gpu.in, gpu.pool);
  fill<<<4 * gpu.sms, 512, 0, gpu.stream>>>(gpu.out, gpu.pool);
  for (int i = 0; i < 200; ++i)  // clocks rise
    copy_once<<<65536, 256, 0, gpu.stream>>>(gpu.out, gpu.in, std::min<int64_t>(gpu.pool, int64_t(65536) * 2048));
  CHECK(cudaStreamSynchronize(gpu.stream));
  CHECK(cudaGetLastError());
  int driver = 0, runtime = 0, clock = 0;
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  Record(0, "gpu")
      .add("gpu", gpu.props.name)
      .add("capability", gpu.props.major + gpu.props.minor / 10.0)
      .add("multiprocessors", gpu.sms)
      .add("l2_bytes", gpu.props.l2CacheSize)
      .add("shared_bytes_per_sm", int64_t(gpu.props.sharedMemPerMultiprocessor))
      .add("clock_mhz", clock / 1000)
      .add("driver", driver)
      .add("runtime", runtime);
}

int main(int argc, char** argv) {
  double limit = 170;
  std::vector<int> chosen;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--limit") == 0 && i + 1 < argc)
      limit = atof(argv[++i]);
    else
      chosen.push_back(atoi(argv[i]));
  }
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  prepare();
  // those that decide most first: what is cut off by the limit is the rest
  const struct {
    int number;
    void (*run)();
  } all[] = {{1, bandwidth},  {2, launches}, {3, barriers}, {4, plain_skeletons}, {5, ring_skeletons},
             {6, reductions}, {7, rereads},  {8, runs},     {9, for_comparison}};
  for (const auto& m : all) {
    if (!chosen.empty() && std::find(chosen.begin(), chosen.end(), m.number) == chosen.end()) continue;
    const double before = seconds();
    if (before > limit) {
      Record(m.number, "all").add("skipped", "no time left");
      continue;
    }
    m.run();
    Record(m.number, "all").add("seconds", seconds() - before);
  }
  return 0;
}
