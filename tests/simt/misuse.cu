// In: the name of one mistake. Out: the emulator's report of it, or "NOT NOTICED" and what the kernel returned. Every
// kernel here but `right` is wrong; tests/cuda/test_simt_emulator.py says who has to notice, and with which words.
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "cuda/device.cuh"

using namespace fastbn::cuda;

namespace {

struct Buffers {
  float* out;      // 1024 of them
  const float* x;  // 512 ones and 512 twos, at a multiple of 16 bytes
  unsigned* counter;
  double* partial;
};

// ---- barriers and warps --------------------------------------------------------------------------------------------

__global__ void divergent_barrier(Buffers b) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  b.out[threadIdx.x] = 1;
}
__global__ void barrier_for_some(Buffers b) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  b.out[threadIdx.x] = 1;
}
__global__ void exit_at_barrier(Buffers) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void barrier_meets_shuffle(Buffers b) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  b.out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
  if (threadIdx.x % 32 >= 16) __syncthreads();
}
__global__ void masks_differ(Buffers b) {
  b.out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1.f, 2) : __shfl_xor_sync(0x55555555u, 1.f, 2);
}
__global__ void lane_not_in_mask(Buffers b) { b.out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 1); }
__global__ void source_not_in_mask(Buffers b) {
  if (threadIdx.x < 16) b.out[threadIdx.x] = __shfl_down_sync(0xffffu, 1.f, 1);
}
__global__ void exited_lane_in_mask(Buffers b) {
  if (threadIdx.x >= 20) return;
  b.out[threadIdx.x] = __shfl_down_sync(~0u, 1.f, 1);
}

// ---- shared memory -------------------------------------------------------------------------------------------------

__global__ void no_syncwarp(Buffers b) {
  FASTBN_SHARED(float, a, [32]);
  a[threadIdx.x] = 1;
  b.out[threadIdx.x] = a[threadIdx.x ^ 1];
}
__global__ void no_syncthreads(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  a[threadIdx.x] = 1;
  __syncwarp();
  b.out[threadIdx.x] = a[threadIdx.x ^ 32];
}
// The second sum overwrites what others still read of the first.
__global__ void write_after_read(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  float sum = 0;
  for (int round = 1; round <= 2; ++round) {
    a[threadIdx.x] = float(round);
    __syncthreads();
    for (int i = 0; i < 64; ++i) sum += load(b.x) * a[i];
  }
  b.out[threadIdx.x] = sum == 64 + 128 ? 1 : NAN;
}
__global__ void unwritten(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  if (threadIdx.x != 7) a[threadIdx.x] = 1;
  __syncthreads();
  b.out[threadIdx.x] = a[threadIdx.x ^ 1];
}
__global__ void static_overrun(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  a[threadIdx.x + 1] = 1;
  __syncthreads();
  b.out[threadIdx.x] = 1;
}
__global__ void dynamic_overrun(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = 1;
  __syncthreads();
  b.out[threadIdx.x] = 1;
}
__global__ void read_overrun(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  a[threadIdx.x] = 1;
  __syncthreads();
  b.out[threadIdx.x] = a[threadIdx.x + 1];
}
__global__ void too_much_static(Buffers b) {
  FASTBN_SHARED(float, a, [4000]);
  a[threadIdx.x] = 1;
  b.out[threadIdx.x] = a[threadIdx.x];
}
// Every order of whole reads and writes gives the same: only TSan can notice.
__global__ void shared_sum(Buffers b) {
  FASTBN_SHARED(float, a, );
  if (threadIdx.x == 0) a = 0;
  __syncthreads();
  a += 1;
  __syncthreads();
  b.out[threadIdx.x] = a == float(blockDim.x) ? 1 : NAN;
}

// ---- vectors and asynchronous copies -------------------------------------------------------------------------------

__global__ void misaligned_load(Buffers b) { b.out[threadIdx.x] = float(load16(b.x + threadIdx.x).word[0] != 0); }
__global__ void misaligned_store(Buffers b) { store16(b.out + threadIdx.x, {}); }
__global__ void misaligned_copy(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  copy16(shared + 4 * threadIdx.x, b.x);
  copies_commit();
  copies_done<0>();
}
template <int left, bool barrier>
__global__ void copies(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  copy16(shared + 16 * threadIdx.x, b.x + 4 * threadIdx.x);
  copies_commit();
  copies_done<left>();
  if (barrier) __syncthreads();
  b.out[threadIdx.x] = reinterpret_cast<const float*>(shared)[4 * (threadIdx.x ^ 1)];
  copies_done<0>();
}
__global__ void copy_read_before_wait(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  copy16(shared + 16 * threadIdx.x, b.x + 4 * threadIdx.x);
  copies_commit();
  copies_done<1>();
  shared_load16(shared + 16 * threadIdx.x);
  copies_done<0>();
  b.out[threadIdx.x] = 1;  // what it read makes no difference here
}
__global__ void copy_never_waited_for(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  copy16(shared + 16 * threadIdx.x, b.x + 4 * threadIdx.x);
  b.out[threadIdx.x] = 1;
}
// A buffer is filled again while others still read it.
__global__ void copy_too_early(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    copy16(shared + 16 * threadIdx.x, b.x + (round * blockDim.x + threadIdx.x) * 4);
    copies_commit();
    copies_done<0>();
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x; ++i) sum += load(b.x) * reinterpret_cast<const float*>(shared)[4 * i];
  }
  b.out[threadIdx.x] = sum == 3 * float(blockDim.x) ? 1 : NAN;
}
__global__ void shared_as_global(Buffers b) {
  FASTBN_SHARED(float, a, [64]);
  a[threadIdx.x] = 1;
  b.out[threadIdx.x] = load(&a[threadIdx.x]);
}
__global__ void global_as_shared(Buffers b) { b.out[threadIdx.x] = float(shared_load16(b.x).word[0] != 0); }
__global__ void stale_load(Buffers b) {
  store(b.out + threadIdx.x, 1.f);
  __syncthreads();
  b.out[threadIdx.x] = load(b.out + (threadIdx.x ^ 1));
}

// ---- blocks that talk to each other --------------------------------------------------------------------------------

enum Flaw { none, no_fence_before, no_fence_after, no_atomic, no_wait };

// Sums over all blocks, which each block must see.
template <Flaw flaw>
__global__ void group_sum(Buffers b) {
  if (threadIdx.x == 0) b.partial[blockIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (flaw != no_fence_before) fence();
    if (flaw == no_atomic) {
      const unsigned seen = load_acquire(b.counter);
      sleep_nanoseconds(100);
      __atomic_store_n(b.counter, seen + 1, __ATOMIC_RELEASE);
    } else {
      add(b.counter, 1);
    }
    if (flaw != no_wait) wait_until([&] { return load_acquire(b.counter) >= gridDim.x; });
    fence();
  }
  __syncthreads();
  double sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += load_fresh(b.partial + i);
  if (blockIdx.x == 0) b.out[threadIdx.x] = sum == double(gridDim.x) ? 1 : NAN;
}

// The last block sums; increment_until is relaxed, so that it takes a fence on both sides.
template <Flaw flaw>
__global__ void last_block_sums(Buffers b) {
  if (threadIdx.x == 0) b.partial[blockIdx.x] = 1;
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    if (flaw != no_fence_before) fence();
    last = increment_until(b.counter, gridDim.x - 1) == gridDim.x - 1;
    if (flaw != no_fence_after) fence();
  }
  if (!__syncthreads_or(last)) return;
  double sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += load_fresh(b.partial + i);
  b.out[threadIdx.x] = sum == double(gridDim.x) ? 1 : NAN;
}

__global__ void stack_overflow(Buffers b) {
  volatile float big[300 << 10];
  for (float& v : const_cast<float (&)[300 << 10]>(big)) v = 1;
  __syncthreads();
  b.out[threadIdx.x] = big[threadIdx.x];
}
__global__ void small_stack_overflow(Buffers b) {
  volatile float big[10 << 10];  // 40 KB: more than a stack of the plain build, no more than it can write over
  for (int i = 0; i < 10 << 10; ++i) big[i] = 1;
  __syncthreads();
  b.out[threadIdx.x] = big[threadIdx.x];
}
__global__ void throws(Buffers) {
  if (threadIdx.x == 3) throw std::runtime_error("thrown by a kernel");
  __syncthreads();
}

// Everything at once, and right.
__global__ void right(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  FASTBN_SHARED(float, sums, [2]);
  copy16(shared + 16 * threadIdx.x, b.x + 4 * threadIdx.x);
  copies_commit();
  copies_done<0>();
  __syncthreads();
  float sum = reinterpret_cast<const float*>(shared)[4 * (threadIdx.x ^ 33)];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum + float(__ballot_sync(1u, 1) - 1);
  __syncthreads();
  if (blockIdx.x == 0) b.out[threadIdx.x] = sums[0] + sums[1] == 64 ? load(b.x) : NAN;
}

}  // namespace

int main(int argc, char** argv) {
  std::unique_ptr<float[]> out(new float[1024]), x(new float[1024]);
  std::vector<double> partial(64);
  unsigned counter = 0;
  for (int i = 0; i < 1024; ++i) out[size_t(i)] = 1, x[size_t(i)] = i < 512 ? 1 : 2;
  const Buffers b{out.get(), x.get(), &counter, partial.data()};
  const auto go = [&](void (*kernel)(Buffers), int64_t blocks, int64_t threads, int64_t shared, bool cooperative) {
    return [=] { launch({blocks, threads, shared, cooperative, nullptr}, kernel, b); };
  };
  const std::map<std::string, std::function<void()>> mistakes = {
      {"right", go(right, 3, 64, 1024, false)},
      {"divergent_barrier", go(divergent_barrier, 1, 64, 0, false)},
      {"barrier_for_some", go(barrier_for_some, 1, 64, 0, false)},
      {"exit_at_barrier", go(exit_at_barrier, 1, 64, 0, false)},
      {"barrier_meets_shuffle", go(barrier_meets_shuffle, 1, 64, 0, false)},
      {"masks_differ", go(masks_differ, 1, 32, 0, false)},
      {"lane_not_in_mask", go(lane_not_in_mask, 1, 32, 0, false)},
      {"source_not_in_mask", go(source_not_in_mask, 1, 32, 0, false)},
      {"exited_lane_in_mask", go(exited_lane_in_mask, 1, 32, 0, false)},
      {"no_syncwarp", go(no_syncwarp, 1, 32, 0, false)},
      {"no_syncthreads", go(no_syncthreads, 1, 64, 0, false)},
      {"write_after_read", go(write_after_read, 1, 64, 0, false)},
      {"unwritten", go(unwritten, 1, 64, 0, false)},
      {"static_overrun", go(static_overrun, 1, 64, 0, false)},
      {"dynamic_overrun", go(dynamic_overrun, 1, 64, 256, false)},
      {"read_overrun", go(read_overrun, 1, 64, 0, false)},
      {"too_much_static", go(too_much_static, 1, 64, 40 << 10, false)},
      {"too_much_dynamic", go(right, 1, 64, 49 << 10, false)},
      {"shared_sum", go(shared_sum, 1, 64, 0, false)},
      {"misaligned_load", go(misaligned_load, 1, 32, 0, false)},
      {"misaligned_store", go(misaligned_store, 1, 32, 0, false)},
      {"misaligned_copy", go(misaligned_copy, 1, 32, 1024, false)},
      {"copy_waits_for_too_few", go(copies<1, true>, 1, 64, 1024, false)},
      {"copy_read_before_wait", go(copy_read_before_wait, 1, 64, 1024, false)},
      {"copy_without_barrier", go(copies<0, false>, 1, 64, 1024, false)},
      {"copy_never_waited_for", go(copy_never_waited_for, 1, 64, 1024, false)},
      {"copy_too_early", go(copy_too_early, 1, 128, 2048, false)},
      {"shared_as_global", go(shared_as_global, 1, 64, 0, false)},
      {"global_as_shared", go(global_as_shared, 1, 64, 0, false)},
      {"stale_load", go(stale_load, 1, 64, 0, false)},
      {"group_sum", go(group_sum<none>, 8, 64, 0, true)},
      {"not_cooperative", go(group_sum<none>, 8, 64, 0, false)},
      {"cooperative_too_large", go(group_sum<none>, 1000, 64, 0, true)},
      {"group_no_fence", go(group_sum<no_fence_before>, 8, 64, 0, true)},
      {"group_no_atomic", go(group_sum<no_atomic>, 8, 64, 0, true)},
      {"group_no_wait", go(group_sum<no_wait>, 8, 64, 0, true)},
      {"last_block", go(last_block_sums<none>, 8, 64, 0, false)},
      {"last_no_fence_before", go(last_block_sums<no_fence_before>, 8, 64, 0, false)},
      {"last_no_fence_after", go(last_block_sums<no_fence_after>, 8, 64, 0, false)},
      {"stack_overflow", go(SIMT_ASAN || SIMT_TSAN ? stack_overflow : small_stack_overflow, 1, 32, 0, false)},
      {"throws", go(throws, 2, 32, 0, false)},
      {"no_threads", go(right, 1, 0, 0, false)},
      {"too_many_threads", go(right, 1, 2048, 0, false)},
  };
  if (argc < 2) {
    for (const auto& [name, launch] : mistakes) std::puts(name.c_str());
    return 0;
  }
  const int64_t seeds = argc > 2 ? std::atoll(argv[2]) : 1;
  for (int64_t seed = 0; seed < seeds; ++seed) {
    simt::config.seed = uint64_t(seed);
    counter = 0;
    partial.assign(64, NAN);
    try {
      mistakes.at(argv[1])();
      for (int i = 0; i < 1024; ++i) {
        if (out[size_t(i)] != 1)
          return std::printf("WRONG RESULT: out[%d] is %g [seed %d]\n", i, out[size_t(i)], int(seed)), 1;
      }
    } catch (const std::exception& e) {
      std::puts(e.what());
      try {  // the next launch knows nothing of it
        for (int i = 0; i < 1024; ++i) out[size_t(i)] = 1;
        mistakes.at("right")();
        for (int i = 0; i < 64; ++i)
          if (out[size_t(i)] != 1) throw std::runtime_error("wrong result");
      } catch (const std::exception& second) {
        std::printf("THE NEXT LAUNCH: %s\n", second.what());
      }
      return 1;
    }
  }
  std::puts("NOT NOTICED");
  return 0;
}
