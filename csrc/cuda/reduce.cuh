// In: sums of each thread, then packets of each block. Out: sums of the block, then of the whole item, for each of its
// channels in shared memory. Everything is merged in an order that depends on the plan alone: same input, same bits.
#pragma once

#include "../core/moments.h"
#include "tile.cuh"

namespace fastbn::cuda {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int lanes_a_warp = 32;
constexpr int warps_a_block = int(threads_a_block) / lanes_a_warp;

// Two sums over a channel.
struct Sums {
  double first, second;
};

// What a thread's sums over T are in. Gradients of parameters are sums around zero, in which every rounding counts.
// bfloat16 has so few digits that float sums of some hundred are as good; of float16 they nearly are, and eight slots
// of doubles are more than a thread has registers for.
template <class T, int slots>
using sum_t = std::conditional_t<std::is_same_v<T, BFloat16> || (sizeof(T) == 2 && slots > 1), float, double>;

// One thread's sums of u and of u * v, for each of its slots; `many` of floats are added to sums in double in between.
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

// Shared memory of a block beside the item itself; scratch_bytes in plan.cpp counts it.
template <class A>
struct Scratch {
  unsigned char* shared;
  const Geometry& g;

  // [2, lanes_a_row * V], or [2, warps_a_block]
  FASTBN_D double* columns() const { return reinterpret_cast<double*>(shared); }
  // [channels_an_item] of Sums or Moments: what all threads take one of, between two barriers.
  template <class P>
  FASTBN_D P& packet(int c) const {
    return reinterpret_cast<P*>(shared + g.packets_offset)[c];
  }
  // [4, channels_an_item]
  FASTBN_D A& at(int k, int c) const {
    return reinterpret_cast<A*>(shared + g.coefficients_offset)[k * int(g.channels_an_item) + c];
  }
};

FASTBN_D double warp_sum(double x, int from_lane_distance) {
  for (int distance = from_lane_distance; distance < lanes_a_warp; distance *= 2) {
    x += __shfl_xor_sync(all_lanes, x, distance);
  }
  return x;
}

// The block's sums of each channel of its item, to scratch.packet<Sums>. All threads call it; it ends with a barrier.
template <class T, int V, class Index, class S, class A>
FASTBN_D void block_sums(const RowsWalk<T, V, Index>&, const S (&a)[1], const S (&b)[1], const Scratch<A>& scratch) {
  const int lane = int(threadIdx.x) % lanes_a_warp, warp = int(threadIdx.x) / lanes_a_warp;
  const double first = warp_sum(double(a[0]), 1), second = warp_sum(double(b[0]), 1);
  if (lane == 0) scratch.columns()[warp] = first, scratch.columns()[warps_a_block + warp] = second;
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int i = 0; i < warps_a_block; ++i) sum += scratch.columns()[int(threadIdx.x) * warps_a_block + i];
    (threadIdx.x == 0 ? scratch.template packet<Sums>(0).first : scratch.template packet<Sums>(0).second) = sum;
  }
  __syncthreads();
}

template <class T, int V, class Index, class S, class A>
FASTBN_D void block_sums(const ColumnsWalk<T, V, Index>& walk, const S (&a)[V], const S (&b)[V],
                         const Scratch<A>& scratch) {
  const int lanes = opaque(walk.g.lanes_a_row);
  const int columns = lanes * V;
  const int lane = int(threadIdx.x) & (lanes - 1);
  // Rows within a warp first, by shuffles; then warp after warp, so that no sum needs more room than a row.
  const int together = larger(lanes, lanes_a_warp);
  const bool holds = lanes >= lanes_a_warp || int(threadIdx.x) % lanes_a_warp < lanes;
  for (int round = 0; round < int(threads_a_block) / together; ++round) {
    const bool mine = int(threadIdx.x) / together == round;
    if (mine) {  // whole warps: the shuffles below name all of their lanes
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double first = warp_sum(double(a[j]), lanes), second = warp_sum(double(b[j]), lanes);
        if (!holds) continue;
        double* const at = scratch.columns() + j * lanes + lane;  // neighbouring lanes, neighbouring banks
        at[0] = round == 0 ? first : at[0] + first;
        at[columns] = round == 0 ? second : at[columns] + second;
      }
    }
    __syncthreads();
  }
  const auto column = [&](int i) { return (i % V) * lanes + i / V; };
  const int a_channel = int(walk.g.columns_a_channel);
  if (a_channel == 1) {
    if (const int c = int(threadIdx.x); c < walk.channels) {
      scratch.template packet<Sums>(c) = {scratch.columns()[column(c)], scratch.columns()[columns + column(c)]};
    }
  } else {
    const int warp = int(threadIdx.x) / lanes_a_warp, within = int(threadIdx.x) % lanes_a_warp;
    for (int c = warp; c < walk.channels; c += warps_a_block) {
      double first = 0, second = 0;
      for (int i = within; i < a_channel; i += lanes_a_warp) {
        first += scratch.columns()[column(c * a_channel + i)];
        second += scratch.columns()[columns + column(c * a_channel + i)];
      }
      first = warp_sum(first, 1), second = warp_sum(second, 1);
      if (within == 0) scratch.template packet<Sums>(c) = {first, second};
    }
  }
  __syncthreads();
}

// Another block's packet, as it is in memory now.
template <class P>
FASTBN_D P load_packet(const P* p) {
  double words[sizeof(P) / sizeof(double)];
  P packet;
#pragma unroll
  for (int i = 0; i < int(sizeof(P) / sizeof(double)); ++i)
    words[i] = load_fresh(reinterpret_cast<const double*>(p) + i);
  memcpy(&packet, words, sizeof(P));
  return packet;
}

// Packets of one kind, as sums that are added without a division, and what the sums of all of them are.
struct OfSums {
  using Packet = Sums;
  FASTBN_D explicit OfSums(const Sums*) {}
  FASTBN_D Sums terms(const Sums& p) const { return p; }
  FASTBN_D Sums whole(const Sums& sum, double, double) const { return sum; }
};
// Chan's formula for many sides at once: sums about the first side's mean, which is near the others', in double.
struct OfMoments {
  using Packet = Moments;
  double reference;
  FASTBN_D explicit OfMoments(const Moments* first) {
    reference = load_fresh(&first->mean);
    if (!(reference - reference == 0)) reference = 0;  // an infinite one would make its own channel NaN
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

// All blocks' packets [blocks, channels_an_item] merged to scratch.packet, a warp for each channel. The order is the
// same in every block that does it. It ends with a barrier.
template <class Of, class A>
FASTBN_D void merge_packets(const typename Of::Packet* packets, const Geometry& g, int channels,
                            const Scratch<A>& scratch) {
  const int warp = int(threadIdx.x) / lanes_a_warp, lane = int(threadIdx.x) % lanes_a_warp;
#pragma unroll 1
  for (int c = warp; c < channels; c += warps_a_block) {
    const Of of(packets + c);
    Sums mine{0, 0};
#pragma unroll 1
    for (unsigned i = unsigned(lane); i < g.blocks_an_item; i += lanes_a_warp) {
      const Sums terms = of.terms(load_packet(packets + i * g.channels_an_item + c));
      mine.first += terms.first, mine.second += terms.second;
    }
    mine = {warp_sum(mine.first, 1), warp_sum(mine.second, 1)};
    if (lane == 0) scratch.template packet<typename Of::Packet>(c) = of.whole(mine, g.count, g.inverse_count);
  }
  __syncthreads();
}

// All blocks of a group wait for each other, and see what each wrote before. One counter a group, zero at first: the
// first block adds what makes all arrivals together flip the top bit and leave the rest as it was, so that it needs no
// resetting. The blocks must all be resident: a cooperative launch.
FASTBN_D void group_barrier(unsigned* counter, unsigned rank, unsigned blocks) {
  constexpr unsigned flag = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    const unsigned before = add(counter, rank == 0 ? flag - (blocks - 1) : 1u);
    wait_until([&] { return ((load_acquire(counter) ^ before) & flag) != 0; });
    fence();
  }
  __syncthreads();
}

// True in the block that comes last of all that share an item: it sees what the others wrote before. The counter is
// zero again after it.
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
