// Reductions: from the sums of each thread to those of the block, and from the partial sums of each block to those of
// the channel tile. Everything is merged in an order that depends on the plan alone, so the same input gives the same
// bits.
#pragma once

#include "../core/moments.h"
#include "access.cuh"

namespace fastbn::cuda {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int lanes_per_warp = 32;
constexpr int warps_per_block = int(threads_per_block) / lanes_per_warp;

// Two sums over a channel.
struct Sums {
  double first, second;
};

// The type of a thread's sums. Gradients of parameters are sums near zero, in which every rounding counts, so float64.
// bfloat16 has so few digits that float32 sums of some hundred terms are as good; float16 with eight slots would need
// more registers than there are.
template <class T, int slots>
using sum_t = std::conditional_t<std::is_same_v<T, BFloat16> || (sizeof(T) == 2 && slots > 1), float, double>;

// One thread's sums of u and u * v for each of its slots. `many`: float32 sums are moved to float64 by flush().
template <class T, int slots, bool many>
struct ThreadSums {
  using S = sum_t<T, slots>;
  static constexpr bool two_levels = many && sizeof(S) < sizeof(double);
  S first[slots] = {}, second[slots] = {};
  double all_first[two_levels ? slots : 1] = {}, all_second[two_levels ? slots : 1] = {};

  FASTBN_D void add(int slot, S u, S v) {
    first[slot] += u;
    second[slot] += u * v;
  }
  FASTBN_D void flush() {
    if constexpr (two_levels) {
#pragma unroll
      for (int j = 0; j < slots; ++j) {
        all_first[j] += double(first[j]), all_second[j] += double(second[j]);
        first[j] = second[j] = 0;
      }
    }
  }
  // After the last flush.
  FASTBN_D const auto& firsts() const {
    if constexpr (two_levels) {
      return all_first;
    } else {
      return first;
    }
  }
  FASTBN_D const auto& seconds() const {
    if constexpr (two_levels) {
      return all_second;
    } else {
      return second;
    }
  }
};

// Shared memory of a block other than the slices; scratch_bytes in plan.cpp counts it.
template <class A>
struct Scratch {
  unsigned char* shared;
  const Geometry& g;

  // [2, lanes_per_row * V], or [2, warps_per_block]
  FASTBN_D double* columns() const { return reinterpret_cast<double*>(shared); }
  // [channels_per_tile] of Sums or Moments, between two barriers.
  template <class P>
  FASTBN_D P& partial(int c) const {
    return reinterpret_cast<P*>(shared + g.partials_offset)[c];
  }
  // [4, channels_per_tile]
  FASTBN_D A& at(int k, int c) const {
    return reinterpret_cast<A*>(shared + g.coefficients_offset)[k * int(g.channels_per_tile) + c];
  }
};

FASTBN_D double warp_sum(double x, int from_lane_distance) {
  for (int distance = from_lane_distance; distance < lanes_per_warp; distance *= 2) {
    x += __shfl_xor_sync(all_lanes, x, distance);
  }
  return x;
}

// The sums of a block for each channel of its tile, to scratch.partial<Sums>. All threads call it; it ends with a
// barrier.
template <class T, int V, class Index, class S, class A>
FASTBN_D void block_sums(const RowAccess<T, V, Index>&, const S (&a)[1], const S (&b)[1], const Scratch<A>& scratch) {
  const int lane = int(threadIdx.x) % lanes_per_warp, warp = int(threadIdx.x) / lanes_per_warp;
  const double first = warp_sum(double(a[0]), 1), second = warp_sum(double(b[0]), 1);
  if (lane == 0) scratch.columns()[warp] = first, scratch.columns()[warps_per_block + warp] = second;
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int i = 0; i < warps_per_block; ++i) sum += scratch.columns()[int(threadIdx.x) * warps_per_block + i];
    (threadIdx.x == 0 ? scratch.template partial<Sums>(0).first : scratch.template partial<Sums>(0).second) = sum;
  }
  __syncthreads();
}

template <class T, int V, class Index, class S, class A>
FASTBN_D void block_sums(const ColumnAccess<T, V, Index>& access, const S (&a)[V], const S (&b)[V],
                         const Scratch<A>& scratch) {
  const int lanes = opaque(access.g.lanes_per_row);
  const int columns = lanes * V;
  const int lane = int(threadIdx.x) & (lanes - 1);
  // Rows within a warp first, by shuffles; then warp after warp, so that sums take the room of one row.
  const int together = larger(lanes, lanes_per_warp);
  const bool holds = lanes >= lanes_per_warp || int(threadIdx.x) % lanes_per_warp < lanes;
  for (int round = 0; round < int(threads_per_block) / together; ++round) {
    const bool mine = int(threadIdx.x) / together == round;
    if (mine) {  // whole warps, because the shuffles below name all lanes
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double first = warp_sum(double(a[j]), lanes), second = warp_sum(double(b[j]), lanes);
        if (!holds) continue;
        double* const at = scratch.columns() + j * lanes + lane;  // neighbouring lanes use neighbouring banks
        at[0] = round == 0 ? first : at[0] + first;
        at[columns] = round == 0 ? second : at[columns] + second;
      }
    }
    __syncthreads();
  }
  const auto column = [&](int i) { return (i % V) * lanes + i / V; };
  const int channel_width = int(access.g.columns_per_channel);
  if (channel_width == 1) {
    if (const int c = int(threadIdx.x); c < access.channels) {
      scratch.template partial<Sums>(c) = {scratch.columns()[column(c)], scratch.columns()[columns + column(c)]};
    }
  } else {
    const int warp = int(threadIdx.x) / lanes_per_warp, within = int(threadIdx.x) % lanes_per_warp;
    for (int c = warp; c < access.channels; c += warps_per_block) {
      double first = 0, second = 0;
      for (int i = within; i < channel_width; i += lanes_per_warp) {
        first += scratch.columns()[column(c * channel_width + i)];
        second += scratch.columns()[columns + column(c * channel_width + i)];
      }
      first = warp_sum(first, 1), second = warp_sum(second, 1);
      if (within == 0) scratch.template partial<Sums>(c) = {first, second};
    }
  }
  __syncthreads();
}

// Another block's partial result, which was written before a barrier.
template <class P>
FASTBN_D P load_partial(const P* p) {
  double words[sizeof(P) / sizeof(double)];
  P partial;
#pragma unroll
  for (int i = 0; i < int(sizeof(P) / sizeof(double)); ++i)
    words[i] = load_fresh(reinterpret_cast<const double*>(p) + i);
  memcpy(&partial, words, sizeof(P));
  return partial;
}

// How partial results of one kind are merged: as sums that need no division, and the result from them.
struct OfSums {
  using Partial = Sums;
  FASTBN_D explicit OfSums(const Sums*) {}
  FASTBN_D Sums terms(const Sums& p) const { return p; }
  FASTBN_D Sums whole(const Sums& sum, double, double) const { return sum; }
};
// Chan's formula for many parts at once, in float64: sums about the mean of the first part, which is near the others.
struct OfMoments {
  using Partial = Moments;
  double reference;
  FASTBN_D explicit OfMoments(const Moments* first) {
    reference = load_fresh(&first->mean);
    if (!(reference - reference == 0)) reference = 0;  // an infinite reference would make the channel NaN
  }
  FASTBN_D Sums terms(const Moments& p) const {
    const double d = p.mean - reference;
    return {p.n * d, p.m2 + p.n * d * d};
  }
  FASTBN_D Moments whole(const Sums& sum, double n, double inverse) const {
    const double shift = sum.first * inverse;
    const double m2 = sum.second - sum.first * shift;
    return {n, reference + shift, m2 < 0 ? 0 : m2};
  }
};

// Merges the partial results [blocks, channels_per_tile] of all blocks to scratch.partial, one warp per channel, in the
// same order in every block. It ends with a barrier.
template <class Of, class A>
FASTBN_D void merge_partials(const typename Of::Partial* partials, const Geometry& g, int channels,
                             const Scratch<A>& scratch) {
  const int warp = int(threadIdx.x) / lanes_per_warp, lane = int(threadIdx.x) % lanes_per_warp;
#pragma unroll 1
  for (int c = warp; c < channels; c += warps_per_block) {
    const Of of(partials + c);
    Sums mine{0, 0};
#pragma unroll 1
    for (unsigned i = unsigned(lane); i < g.batch_splits; i += lanes_per_warp) {
      const Sums terms = of.terms(load_partial(partials + i * g.channels_per_tile + c));
      mine.first += terms.first, mine.second += terms.second;
    }
    mine = {warp_sum(mine.first, 1), warp_sum(mine.second, 1)};
    if (lane == 0) scratch.template partial<typename Of::Partial>(c) = of.whole(mine, g.count, g.inverse_count);
  }
  __syncthreads();
}

// A barrier for the blocks of a group, with release and acquire semantics. One counter per group, zero at first: the
// increments of all blocks together flip the top bit and leave the rest as it was, so it needs no reset. The blocks
// must all be resident: a cooperative launch.
FASTBN_D void group_barrier(unsigned* counter, unsigned split, unsigned blocks) {
  constexpr unsigned flag = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    const unsigned before = add(counter, split == 0 ? flag - (blocks - 1) : 1u);
    wait_until([&] { return ((load_acquire(counter) ^ before) & flag) != 0; });
    fence();
  }
  __syncthreads();
}

// True in the last block of those that share a channel tile: it sees what the others wrote. The counter is zero again
// after it.
FASTBN_D bool is_last_block(unsigned* counter, unsigned blocks) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence();
    last = increment_until(counter, blocks - 1) == blocks - 1;
    fence();
  }
  return __syncthreads_or(last) != 0;
}

}  // namespace fastbn::cuda
