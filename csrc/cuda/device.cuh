// What kernels and launches need of the device, with twins in tests/simt for the CPU: launches, shared memory, barriers
// between blocks, 16-byte and asynchronous copies. The only inline PTX.
#pragma once

#include "../core/platform.h"
#include "plan.h"

// 16 bytes of a tensor, in four registers.
namespace fastbn::cuda {
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
}  // namespace fastbn::cuda

#if !defined(__CUDACC__)
#include "simt.h"  // tests/simt/: every CUDA thread is a fiber of one CPU thread
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

// A static array in shared memory: FASTBN_SHARED(double, sums, [32]);
#define FASTBN_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// The dynamic shared memory of the launch, aligned to 128 bytes.
#define FASTBN_DYNAMIC_SHARED(name)                                 \
  extern __shared__ __align__(128) unsigned char fastbn_dynamic_[]; \
  unsigned char* const name = fastbn_dynamic_

namespace fastbn::cuda {

#define FASTBN_D __device__ __forceinline__

// ---- host ----------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or a later call would report it
  std::string hint;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    hint =
        ". This build of fastbn has no code for this GPU: rebuild it with TORCH_CUDA_ARCH_LIST set to the GPU's "
        "compute capability (7.0 or later)";
  }
  throw std::runtime_error(std::string("fastbn: ") + what + ": " + cudaGetErrorString(error) + hint);
}

struct Launch {
  int64_t blocks;
  int64_t threads;
  int64_t shared_bytes;
  bool cooperative;
  void* stream;
  int64_t cluster = 1;  // blocks of a cluster
};

// Raises the limit of a kernel's dynamic shared memory to that of the current device, and returns how many of its
// blocks fit on one multiprocessor.
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), int64_t threads, int64_t shared_bytes) {
  int device = 0, limit = 0, blocks = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device attribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(threads), size_t(shared_bytes)),
        "occupancy");
  return blocks;
}

// How many clusters of blocks of a kernel fit on the current device.
template <class... P>
int64_t resident_clusters(void (*kernel)(P...), int64_t threads, int64_t shared_bytes, int64_t cluster) {
  resident_blocks(kernel, threads, shared_bytes);
  // Code for older GPUs, which the driver may have compiled for this one, has no clusters.
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kernel), "attributes of a kernel");
  if (code.ptxVersion < 90) return 0;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(cluster)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes), config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "occupancy of clusters");
  return clusters;
}

// False if the blocks of a cooperative launch do not fit beside each other: occupancy does not know of other processes
// (MPS) and of partitions of the GPU (green contexts).
template <class... P, class... A>
bool launch(const Launch& how, void (*kernel)(P...), A&&... args) {
  cudaLaunchAttribute attribute[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(how.blocks));
  config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attribute;
  if (how.cooperative) {
    attribute[0].id = cudaLaunchAttributeCooperative;
    attribute[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  if (how.cluster > 1) {
    attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attribute[config.numAttrs].val.clusterDim = {unsigned(how.cluster), 1, 1};
    ++config.numAttrs;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...);
  if (error == cudaErrorCooperativeLaunchTooLarge || (how.cluster > 1 && error == cudaErrorInvalidClusterSize)) {
    cudaGetLastError();
    return false;
  }
  check(error, "kernel launch");
  return true;
}

// The numbers of the current device.
inline Device query_device() {
  int index = 0;
  check(cudaGetDevice(&index), "current device");
  const auto get = [&](cudaDeviceAttr what) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, index), "device attribute");
    return int64_t(value);
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin), get(cudaDevAttrReservedSharedMemoryPerBlock),
          get(cudaDevAttrMaxRegistersPerMultiprocessor), get(cudaDevAttrMaxThreadsPerMultiProcessor),
          get(cudaDevAttrCooperativeLaunch) != 0,
          // eight blocks are the most that every GPU with clusters can launch
          get(cudaDevAttrClusterLaunch) != 0 ? 8 : 1,
          // two transfers per clock (kHz) on the bus; memory sustains about nine tenths of that
          get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth) / 4 / 1000 * 9 / 10};
}

inline int current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "current device");
  return index;
}

// The compiler needs more registers for sm_80 than for later GPUs.
#if __CUDA_ARCH__ < 900
constexpr bool spares_registers = true;
#else
constexpr bool spares_registers = false;
#endif

// Whether blocks of a cluster read each other's shared memory.
#if __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
#else
constexpr bool has_clusters = false;
#endif

// Hides a value from the optimizer, so that what is derived from it is recomputed instead of kept in registers between
// loops.
FASTBN_D int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- memory --------------------------------------------------------------------------------------------------------

// All accesses of kernels to tensors go through these functions, so that the emulator counts bytes.
template <class T>
FASTBN_D T load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(p));
    T value;
    memcpy(&value, &bits, 2);
    return value;
  } else {
    return __ldg(p);
  }
}
// A plain load: for memory that this launch may write, and for the last use of a value.
template <class T>
FASTBN_D T load_last(const T* p) {
  return *p;
}
template <class T>
FASTBN_D void store(T* p, T value) {
  *p = value;
}
FASTBN_D Bytes16 load16(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
// Streaming load (ld.global.cs): the line is not read again, so mark it evict-first in L2.
FASTBN_D Bytes16 load16_last(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
// In assembly, because the compiler would merge it with the stores of single elements beside it, and store those alone.
FASTBN_D void store16(void* p, const Bytes16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
FASTBN_D Bytes16 shared_load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
FASTBN_D void shared_store16(void* p, const Bytes16& v) {
  *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Copies 16 bytes from global to shared memory; complete after copies_done<n>(), except for the last n commits of this
// thread.
FASTBN_D void copy16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  shared_store16(shared, load16(global));
#endif
}
// The same for what another block wrote before a barrier: not by way of L1.
FASTBN_D void copy16_fresh(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  copy16(shared, global);
#else
  const uint4 v = __ldcg(static_cast<const uint4*>(global));
  shared_store16(shared, {{v.x, v.y, v.z, v.w}});
#endif
}
FASTBN_D void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n>
FASTBN_D void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// Requests the sector of the second-level cache that p is in.
FASTBN_D void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p))); }

// a * b, rounded: never fused with an addition, which would give another result in one kernel than in the other.
FASTBN_D double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// ---- synchronization of blocks -------------------------------------------------------------------------------------

FASTBN_D void fence() { __threadfence(); }
FASTBN_D unsigned load_relaxed(const unsigned* p) {
  unsigned v;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
#else
  v = *static_cast<const volatile unsigned*>(p);
#endif
  return v;
}
FASTBN_D unsigned load_acquire(const unsigned* p) {
  unsigned v;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
#else
  v = *static_cast<const volatile unsigned*>(p), __threadfence();
#endif
  return v;
}
// A load that bypasses L1, for results that another block wrote before a barrier.
template <class T>
FASTBN_D T load_fresh(const T* p) {
  return __ldcg(p);
}
FASTBN_D unsigned add(unsigned* p, unsigned v) { return atomicAdd(p, v); }
// old >= last ? 0 : old + 1
FASTBN_D unsigned increment_until(unsigned* p, unsigned last) { return atomicInc(p, last); }
// Adds to a counter. Who sees the sum by load_acquire() sees what the threads of this block wrote before their last
// __syncthreads().
FASTBN_D void add_release(unsigned* p, unsigned v) {
#if __CUDA_ARCH__ >= 700
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
#else
  __threadfence(), atomicAdd(p, v);
#endif
}
// increment_until() with release and acquire semantics; returns old.
FASTBN_D unsigned take_ticket(unsigned* p, unsigned last) {
  unsigned old;
#if __CUDA_ARCH__ >= 700
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(p)), "r"(last)
               : "memory");
#else
  __threadfence(), old = atomicInc(p, last), __threadfence();
#endif
  return old;
}
// Polls with pauses, so that the blocks that wait leave the counter's slice of L2 to those that arrive. A single load
// in the loop: a conditional pause would make the compiler peel off the first one.
template <class Done>
FASTBN_D void wait_until(Done&& done) {
  bool waiting;
#pragma unroll 1
  do {
    waiting = !done();
#if __CUDA_ARCH__ >= 700
    __nanosleep(waiting ? 32 : 0);
#endif
  } while (waiting);
}
// A barrier of all threads of a cluster, with release and acquire semantics.
FASTBN_D void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
FASTBN_D void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// 16 bytes at the same place in the shared memory of another block of the cluster.
FASTBN_D Bytes16 cluster_load16(const void* p, unsigned rank) {
  Bytes16 v{};
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(unsigned(__cvta_generic_to_shared(p))), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(there)
               : "memory");
#endif
  return v;
}
FASTBN_D void sleep_nanoseconds(int64_t ns) {
#if __CUDA_ARCH__ >= 700
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (int64_t(now - start) < ns);
#endif
}

}  // namespace fastbn::cuda

#endif
