// Reductions: from the sums of each thread to those of the block, in an order that depends on the plan alone, so the
// same input gives the same bits.
#pragma once

#include "../core/moments.h"
#include "access.cuh"

namespace fastbn::cuda {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int lanes_per_warp = 32;

// Two sums over a channel.
struct Sums {
  double first, second;
};

// A partial result of a channel: its mean and M2 in the forward pass, its sums in the backward pass. Its count is known
// from the plan.
struct alignas(16) Record {
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

  // The sums that threads leave for each other; sums_bytes in plan.cpp counts them.
  template <class S>
  FASTBN_D S* sums() const {
    return reinterpret_cast<S*>(shared);
  }
  // [channels_per_tile]: of the block, and after merging of the channel.
  FASTBN_D Record& record(int c) const { return reinterpret_cast<Record*>(shared + g.records_offset)[c]; }
  // [channels_per_tile]: of the channel, in the block of a cluster that merges it.
  FASTBN_D Record& merged(int c) const { return (&record(0))[int(g.channels_per_tile) + c]; }
  // [3, channels_per_tile]: what is known of a channel before its sums are.
  FASTBN_D double& parameter(int k, int c) const {
    return reinterpret_cast<double*>(shared + g.parameters_offset)[k * int(g.channels_per_tile) + c];
  }
  // [4, channels_per_tile]
  FASTBN_D A& at(int k, int c) const {
    return reinterpret_cast<A*>(shared + g.coefficients_offset)[k * int(g.channels_per_tile) + c];
  }
};

// How sums of columns are left in shared memory. Of 16-bit types in float, whose rounding is far below theirs: in
// double those of 512-byte rows would be more than the 48 KB that every launch may use.
template <class T>
using stored_t = std::conditional_t<sizeof(T) == 2, float, double>;

// The sum over `lanes` neighbouring lanes, a power of two, in all of them. All lanes of the warp call it.
FASTBN_D double lanes_sum(double x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(all_lanes, x, distance);
  return x;
}

// Both sums over `lanes` neighbouring lanes, in the first of them: half of the lanes add up the first, half the second.
FASTBN_D Sums lanes_sums(const Sums& s, int lanes) {
  if (lanes == 1) return s;
  const int half = lanes / 2;
  const bool upper = (int(threadIdx.x) & half) != 0;
  double mine = upper ? s.second : s.first;
  mine += __shfl_xor_sync(all_lanes, upper ? s.first : s.second, half);
  mine = lanes_sum(mine, half);
  return {mine, __shfl_xor_sync(all_lanes, mine, half)};
}

// Sums N values over the lanes of a warp that are a multiple of `lanes` apart, from `distance` down. At each step a
// lane keeps one half of its values and gives the other half away, so that all lanes end with a part of the sums:
// done(first value, values) is called with it in one lane for each part.
template <int N, class X, class Done>
FASTBN_D void sum_rows(const X (&value)[N], int first, int distance, int lanes, bool mine, const Done& done) {
  if (distance < lanes) {
    if (mine) done(first, value);
    return;
  }
  const bool upper = (int(threadIdx.x) & distance) != 0;
  if constexpr (N > 1) {
    double half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const X keep = upper ? value[i + N / 2] : value[i], give = upper ? value[i] : value[i + N / 2];
      half[i] = double(keep) + double(__shfl_xor_sync(all_lanes, give, distance));
    }
    if constexpr (N / 2 == 1) {
      double one[1] = {half[0]};
      for (int d = distance / 2; d >= lanes; d /= 2) {
        one[0] += __shfl_xor_sync(all_lanes, one[0], d);
        mine = mine && (int(threadIdx.x) & d) == 0;
      }
      if (mine) done(first + (upper ? 1 : 0), one);
    } else {
      sum_rows(half, first + (upper ? N / 2 : 0), distance / 2, lanes, mine, done);
    }
  }
}

// The sums of a block for each channel of its tile: body(channel, Sums) is called by one thread for each, after a
// barrier behind which no thread needs anything else of the scratch.
template <class T, int V, class Index, bool whole, class S, class A, class Body>
FASTBN_D void block_sums(const RowAccess<T, V, Index, whole>& access, const S (&a)[1], const S (&b)[1],
                         const Scratch<A>& scratch, const Body& body) {
  const int lane = int(threadIdx.x) % lanes_per_warp, warp = int(threadIdx.x) / lanes_per_warp;
  const int warps = access.g.warps;
  double* const sums = scratch.template sums<double>();
  const Sums of_warp = lanes_sums({double(a[0]), double(b[0])}, lanes_per_warp);
  if (lane == 0) sums[warp] = of_warp.first, sums[warps + warp] = of_warp.second;
  __syncthreads();
  if (warp != 0) return;
  const bool mine = lane < warps;
  const Sums all = lanes_sums({mine ? sums[lane] : 0, mine ? sums[warps + lane] : 0}, lanes_per_warp);
  if (lane == 0) body(0, all);
}

// A channel that spans vectors: a vector has values of two channels at most, so each thread leaves two pairs of sums.
template <class T, int V, class Index, class S, class A, class Body>
FASTBN_D void wide_sums(const ColumnAccess<T, V, Index>& access, const S (&a)[V], const S (&b)[V],
                        const Scratch<A>& scratch, const Body& body) {
  const int threads = access.g.threads, width = int(access.g.columns_per_channel);
  const int lane = int(threadIdx.x) % lanes_per_warp, warp = int(threadIdx.x) / lanes_per_warp;
  stored_t<T>* const sums = scratch.template sums<stored_t<T>>();
  {
    const int column = access.lane * V, next = (column / width + 1) * width - column;  // slots of the first channel
    double first[2] = {}, second[2] = {};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool head = j < next;
      first[0] += head ? double(a[j]) : 0, second[0] += head ? double(b[j]) : 0;
      first[1] += head ? 0 : double(a[j]), second[1] += head ? 0 : double(b[j]);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sums[2 * k * threads + int(threadIdx.x)] = stored_t<T>(first[k]);
      sums[(2 * k + 1) * threads + int(threadIdx.x)] = stored_t<T>(second[k]);
    }
  }
  __syncthreads();
  for (int c = warp; c < access.channels; c += access.g.warps) {
    const int from = c * width / V, to = ((c + 1) * width - 1) / V;
    Sums mine{0, 0};
    for (int l = from + lane; l <= to; l += lanes_per_warp) {
      const stored_t<T>* const at = sums + (l * V >= c * width ? 0 : 2 * threads) + l;
      for (int r = 0; r < int(access.g.step_rows); ++r) {
        mine.first += double(at[r * access.g.lanes_per_row]);
        mine.second += double(at[r * access.g.lanes_per_row + threads]);
      }
    }
    mine = lanes_sums(mine, lanes_per_warp);
    if (lane == 0) body(c, mine);
  }
}

template <class T, int V, class Index, class S, class A, class Body>
FASTBN_D void block_sums(const ColumnAccess<T, V, Index>& access, const S (&a)[V], const S (&b)[V],
                         const Scratch<A>& scratch, const Body& body) {
  if (access.g.spans_vectors) return wide_sums(access, a, b, scratch, body);
  // Rows within a warp by shuffles; then the shares of the warps, or of rows that are longer than a warp.
  const int lanes = access.g.lanes_per_row, columns = lanes * V, width = int(access.g.columns_per_channel);
  const int shares = lanes <= lanes_per_warp ? access.g.warps : access.g.threads / lanes;
  const int pitch = 2 * columns + 1;  // lanes that read neighbouring shares use neighbouring banks
  stored_t<T>* const sums = scratch.template sums<stored_t<T>>();
  {
    const int share = int(threadIdx.x) / larger(lanes, lanes_per_warp), lane = access.lane;
    S value[2 * V];
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = a[j], value[V + j] = b[j];
    // Value i is column i % V of the lane, of its first sum or its second one.
    sum_rows(value, 0, lanes_per_warp / 2, lanes, true, [&](int first, const auto& part) {
      constexpr int n = int(sizeof(part) / sizeof(part[0]));
      stored_t<T>* const at = sums + share * pitch + lane;
#pragma unroll
      for (int i = 0; i < n; ++i) at[(first + i) / V * columns + (first + i) % V * lanes] = stored_t<T>(part[i]);
    });
  }
  __syncthreads();
  const int share = int(threadIdx.x) & (shares - 1), at_once = access.g.threads / shares;
  for (int base = 0; base < access.channels; base += at_once) {
    const int c = base + int(threadIdx.x) / shares;
    Sums mine{0, 0};
    if (c < access.channels) {
      for (int i = c * width; i < (c + 1) * width; ++i) {
        const stored_t<T>* const at = sums + share * pitch + i % V * lanes + i / V;
        mine.first += double(at[0]), mine.second += double(at[columns]);
      }
    }
    mine = lanes_sums(mine, shares);
    if (share == 0 && c < access.channels) body(c, mine);
  }
}

}  // namespace fastbn::cuda
