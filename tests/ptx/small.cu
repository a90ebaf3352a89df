// Small kernels whose costs are known by hand, for the tests of the counters, and some whose accesses to memory are in
// order or not:
//   small NAME
// Prints a checksum of what the kernel wrote. x and y are tensors to the counters, everything else is not.
#include "cuda/device.cuh"

using namespace fastbn::cuda;

struct Buffers {
  const float* x;    // [4096], ones
  float* y;          // [4096]
  const int* chain;  // [16], each the index of the next
  unsigned* counter;
};

// 16 bytes a thread, neighbours side by side: 16 sectors a request, no more than the bytes need.
extern "C" __global__ void coalesced(Buffers b) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  store16(b.y + i, load16(b.x + i));
}
// 4 bytes of every 32: 32 sectors where 4 would do.
extern "C" __global__ void strided(Buffers b) {
  const int i = int(threadIdx.x) * 8;
  store(b.y + i, load(b.x + i));
}
// All lanes read one number: one sector.
extern "C" __global__ void broadcast(Buffers b) { store(b.y + threadIdx.x, load(b.x + blockIdx.x)); }

// Words of shared memory at some distance: the store has as many cycles as lanes meet in a bank, the load one.
template <int distance>
FASTBN_D void through_shared(const Buffers& b) {
  FASTBN_DYNAMIC_SHARED(shared);
  float* const words = reinterpret_cast<float*>(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  words[warp * 1024 + lane * distance] = load(b.x + threadIdx.x);
  __syncthreads();
  b.y[threadIdx.x] = words[(warp ^ 1) * 1024 + lane];
}
extern "C" __global__ void no_conflict(Buffers b) { through_shared<1>(b); }
extern "C" __global__ void conflict_of_2(Buffers b) { through_shared<2>(b); }
extern "C" __global__ void conflict_of_32(Buffers b) { through_shared<32>(b); }

// Ten turns of a loop that the compiler leaves as it is, with one fused multiply-add each.
extern "C" __global__ void ten_turns(Buffers b) {
  float sum = load(b.x + threadIdx.x);
  int left = opaque(10);
#pragma unroll 1
  do sum = __builtin_fmaf(sum, 0.5f, 1.0f);
  while (--left != 0);
  store(b.y + threadIdx.x, sum);
}
// Odd lanes make eleven turns, even ones nine: eleven turns of the warp, with 16 lanes in the last two.
extern "C" __global__ void divergent_turns(Buffers b) {
  float sum = load(b.x + threadIdx.x);
  int left = opaque(9 + 2 * int(threadIdx.x & 1));
#pragma unroll 1
  do sum = __builtin_fmaf(sum, 0.5f, 1.0f);
  while (--left != 0);
  store(b.y + threadIdx.x, sum);
}
// Five loads, each of which needs the one before, between a load from the tensor and the store to it.
extern "C" __global__ void five_round_trips(Buffers b) {
  const float first = load(b.x + threadIdx.x);
  int at = int(first) & 15;
#pragma unroll 1
  for (int i = 0; i < opaque(5); ++i) at = load(b.chain + at);
  store(b.y + threadIdx.x, first + float(at));
}
// Three barriers of a block, and one of all blocks.
extern "C" __global__ void barriers(Buffers b) {
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    add(b.counter, 1);
    wait_until([&] { return load_acquire(b.counter) == gridDim.x; });
  }
  __syncthreads();
  store(b.y + threadIdx.x, 1.0f);
  __syncthreads();
}
// Four 16-byte copies a thread, in two commits.
extern "C" __global__ void copies(Buffers b) {
  FASTBN_DYNAMIC_SHARED(shared);
  unsigned char* const at = shared + 64 * threadIdx.x;
  for (int i = 0; i < 4; ++i) {
    copy16(at + 16 * i, b.x + 4 * (4 * threadIdx.x + i));
    if (i % 2 == 1) copies_commit();
  }
  copies_done<0>();
  store16(b.y + 4 * threadIdx.x, shared_load16(at));
}

// ---- the order of memory between threads

// The first threads of two warps publish a number each; a thread of another block waits for both and reads them.
FASTBN_D void publish(const Buffers& b) {
  if (blockIdx.x != 0 || threadIdx.x % 32 != 0) return;
  store(b.y + threadIdx.x, 2.0f);
  fence();
  add(b.counter, 1);
}
FASTBN_D void wait_for_both(const Buffers& b) {
  wait_until([&] { return load_acquire(b.counter) == 2; });
}
FASTBN_D void read_both(const Buffers& b) { store(b.y + 64, load_fresh(b.y) + load_fresh(b.y + 32)); }

extern "C" __global__ void published(Buffers b) {
  publish(b);
  if (blockIdx.x != 1 || threadIdx.x != 0) return;
  wait_for_both(b);
  read_both(b);
}
// The counter is read by an atomic operation, which does not acquire; a fence after it does.
template <bool fenced>
FASTBN_D void read_after_atomic(const Buffers& b) {
  publish(b);
  if (blockIdx.x != 1 || threadIdx.x != 0) return;
  wait_until([&] { return add(b.counter, 0) == 2; });
  if (fenced) fence();
  read_both(b);
}
extern "C" __global__ void read_after_fence(Buffers b) { read_after_atomic<true>(b); }
extern "C" __global__ void read_without_acquire(Buffers b) { read_after_atomic<false>(b); }
// Another thread reads than the one that waited, after a barrier of the warp or of the block.
template <bool block>
FASTBN_D void read_by_another(const Buffers& b) {
  publish(b);
  if (blockIdx.x == 1 && threadIdx.x == 0) wait_for_both(b);
  if (block) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (blockIdx.x == 1 && threadIdx.x == 1) read_both(b);
}
extern "C" __global__ void read_after_syncwarp(Buffers b) { read_by_another<false>(b); }
extern "C" __global__ void read_after_syncthreads(Buffers b) { read_by_another<true>(b); }
// A thread reads what its neighbour wrote, after a barrier of the warp, or with none.
template <bool barrier>
FASTBN_D void read_neighbour(const Buffers& b) {
  float* const y = b.y + 256 * blockIdx.x;
  store(y + 2 * threadIdx.x, 1.0f);
  if (barrier) __syncwarp();
  const float next = load_last(y + 2 * (threadIdx.x - threadIdx.x % 2));
  store(y + 2 * threadIdx.x + 1, next + 1);
}
extern "C" __global__ void neighbour_after_syncwarp(Buffers b) { read_neighbour<true>(b); }
extern "C" __global__ void neighbour_without_barrier(Buffers b) { read_neighbour<false>(b); }

#if !defined(__CUDACC__)
#include <iostream>

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const std::pair<const char*, void (*)(Buffers)> kernels[] = {
      {"coalesced", coalesced},
      {"strided", strided},
      {"broadcast", broadcast},
      {"no_conflict", no_conflict},
      {"conflict_of_2", conflict_of_2},
      {"conflict_of_32", conflict_of_32},
      {"ten_turns", ten_turns},
      {"divergent_turns", divergent_turns},
      {"five_round_trips", five_round_trips},
      {"barriers", barriers},
      {"copies", copies},
      {"published", published},
      {"read_after_syncwarp", read_after_syncwarp},
      {"read_after_syncthreads", read_after_syncthreads},
      {"read_after_fence", read_after_fence},
      {"read_without_acquire", read_without_acquire},
      {"neighbour_after_syncwarp", neighbour_after_syncwarp},
      {"neighbour_without_barrier", neighbour_without_barrier},
  };
  alignas(128) static float x[4096], y[4096];
  alignas(128) static int chain[16];
  alignas(128) static unsigned counter[8];
  std::fill(std::begin(x), std::end(x), 1.0f);
  for (int i = 0; i < 16; ++i) chain[i] = (i + 1) % 16;
  try {
    if (auto* const tensor =
            reinterpret_cast<void (*)(const char*, const void*, size_t)>(simt::translated_symbol("ptx_name_tensor"))) {
      tensor("x", x, sizeof x), tensor("y", y, sizeof y);
    }
    for (const auto& [known, kernel] : kernels) {
      if (name == known) launch({2, 64, 16 << 10, true, nullptr}, kernel, Buffers{x, y, chain, counter});
    }
  } catch (const std::exception& e) {
    std::cout << "FAILED: " << e.what() << std::endl;
    return 1;
  }
  double sum = 0;
  for (const float v : y) sum += double(v);
  std::cout << sum << std::endl;
  return 0;
}
#endif
