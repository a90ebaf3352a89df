// In: moments or sums of a whole channel. Out: what batch norm returns for it, and the coefficients for its elements.
#pragma once

#include "../core/dispatch.h"
#include "../core/formula.h"
#include "math.cuh"
#include "reduce.cuh"

namespace fastbn::cuda {

// Of T whose sums are in a float that squares of large T do not fit into, another row: a factor for the differences, a
// power of two. A product and a sum are one operation; what the register for it costs was not timed.
template <class T>
constexpr int pivot_rows = std::is_same_v<T, BFloat16> ? 2 : 1;
// The largest value times it squares to 2^112, and what did not fit without it keeps its digits.
constexpr float factor_of_large = 0x1p-72f;

// The value nearest the middle of a channel that costs nothing to find: one of the share's first. Sums of differences
// from it keep the digits that sums of the values would lose.
template <class T, class Walk, class A>
FASTBN_D void choose_pivots(const Walk& walk, const T* x, const Scratch<A>& scratch, int channels) {
  if (const int c = int(threadIdx.x); c < channels) {
    const int64_t at = walk.some_value(c);
    const A value = at < 0 ? A(0) : to_acc(load(x + at));
    if constexpr (pivot_rows<T> == 2) scratch.at(1, c) = 1;
    scratch.at(0, c) = value - value == 0 ? value : A(0);  // an infinite one would spoil the others
  }
  __syncthreads();
}

// x less its pivot, as it is summed.
template <class T, int slots, class A>
FASTBN_D sum_t<T, slots> difference(A x, const A (&pivot)[pivot_rows<T>][slots], int slot) {
  using S = sum_t<T, slots>;
  if constexpr (pivot_rows<T> == 2) {
    return std::fma(x, pivot[1][slot], -pivot[0][slot] * pivot[1][slot]);
  } else {
    return S(x) - S(pivot[0][slot]);
  }
}

// Tries at the sums of a share: with a factor if they overflow, with another pivot if that was far from the mean.
template <class T>
constexpr int attempts = 1 + pivot_rows<T>;

// The share's moments from its sums of differences, to scratch.packet. True if they overflowed, or if a pivot was so
// far from the mean that digits were lost: then that pivot is the mean found, for another try; the other channels' will
// find the same sums again. All threads call it.
template <class T, class A>
FASTBN_D bool moments_of_share(const Share& share, const Scratch<A>& scratch) {
  // Float sums of squares lose a bit where the distance is one standard deviation, and four where it is four.
  constexpr double allowed = 16;
  const int c = int(threadIdx.x);
  Moments m{};
  bool bad = false;
  if (c < share.channels) {
    Sums sums = scratch.template packet<Sums>(c);
    bool overflows = false;
    if constexpr (pivot_rows<T> == 2) {
      const double factor = scratch.at(1, c);
      sums.first /= factor, sums.second /= factor * factor;
      overflows = !(sums.second - sums.second == 0) && factor == 1;
      if (overflows) scratch.at(1, c) = factor_of_large;
    }
    m = from_shifted_sums(share.count, double(scratch.at(0, c)), sums.first, sums.second);
    const A mean = A(m.mean);
    bad = !pivot_was_good(share.count, sums.first, m, allowed) && mean - mean == 0 && mean != scratch.at(0, c);
    if (overflows) bad = true, m.mean = scratch.at(0, c);  // the sums say nothing of the pivot
  }
  __syncthreads();  // the packets lie where the sums were
  if (c < share.channels) {
    scratch.template packet<Moments>(c) = m;
    if (bad) scratch.at(0, c) = A(m.mean);
  }
  return __syncthreads_or(bad) != 0;
}

// What the forward pass returns for one channel beside its output.
FASTBN_D void finish_moments(const Forward& args, int64_t channel, double mean, double variance) {
  const int64_t channels = args.problem.shape.C;
  if (args.moments != nullptr) args.moments[channel] = mean, args.moments[channels + channel] = variance;
  if (args.training) update(args.running, channel, mean, variance, double(args.problem.shape.per_channel()));
}

// args: of the forward pass, or of the backward pass, which gets the same numbers by it.
template <class Args, class A>
FASTBN_D void set_normalization(const Args& args, int64_t channel, double mean, double variance,
                                const Scratch<A>& scratch, int c) {
  const auto z = normalization<A>(mean, variance, args.eps, read(args.weight, channel, 1), read(args.bias, channel, 0));
  scratch.at(0, c) = z.mean, scratch.at(1, c) = z.scale, scratch.at(2, c) = z.shift;
}

template <class A>
FASTBN_D void set_normalization(const Backward& args, int64_t channel, const Scratch<A>& scratch, int c) {
  set_normalization(args, channel, args.moments[channel], args.moments[args.problem.shape.C + channel], scratch, c);
}

// Kernels sum dy * (x - the mean rounded to A); this is what they would have with the mean itself.
template <class A>
FASTBN_D Sums corrected(const Backward& args, int64_t channel, const Sums& sums) {
  const double mean = args.moments[channel];
  const double lost = mean - double(coefficient<A>(mean));
  return {sums.first, lost == 0 ? sums.second : sums.second - lost * sums.first};
}

// What the backward pass returns for one channel beside the gradient of the input.
FASTBN_D void finish_sums(const Backward& args, int64_t channel, const Sums& sums) {
  const double variance = args.moments[args.problem.shape.C + channel];
  write(args.grad_weight, channel, sums.second * reciprocal_std(variance, args.eps));
  write(args.grad_bias, channel, sums.first);
}

// The sums of a batch that is spread over ranks, as they came in.
FASTBN_D Sums total_sums(const Backward& args, int64_t channel) {
  const int64_t channels = args.problem.shape.C;
  const double variance = args.moments[channels + channel];
  return {args.total[channels + channel], args.total[channel] / reciprocal_std(variance, args.eps)};
}

// count: of the values that the sums were made of.
template <class A>
FASTBN_D void set_input_gradient(const Backward& args, int64_t channel, const Sums& sums, double count,
                                 const Scratch<A>& scratch, int c) {
  const int64_t channels = args.problem.shape.C;
  const auto g = input_gradient<A>(args.moments[channel], args.moments[channels + channel], args.eps,
                                   read(args.weight, channel, 1), count, sums.first, sums.second);
  scratch.at(0, c) = g.mean, scratch.at(1, c) = g.x_scale, scratch.at(2, c) = g.scale, scratch.at(3, c) = g.shift;
}

// Where an activation is found at run time, the arithmetic of the largest one needs the registers that coefficients of
// several slots would be kept in: they are taken anew for each piece.
template <class Walk, class Epilogue>
constexpr bool takes_anew = Epilogue::any && Walk::slots > 1;

// The first rows of the coefficients, for each slot of this thread.
template <int rows, class Walk, class A>
FASTBN_D void take(const Walk& walk, const Scratch<A>& scratch, A (&out)[rows][Walk::slots]) {
#pragma unroll
  for (int k = 0; k < rows; ++k) {
#pragma unroll
    for (int j = 0; j < Walk::slots; ++j) out[k][j] = 0;
  }
  walk.each_slot([&](int slot, int channel) {
#pragma unroll
    for (int k = 0; k < rows; ++k) out[k][slot] = scratch.at(k, channel);
  });
}

// Values of a piece become z without the residual, given mean, scale and shift.
template <int slots, class A, int V>
FASTBN_D void normalize(A (&value)[V], const A (&z)[3][slots]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int slot = slots == 1 ? 0 : j;
    value[j] = normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
  }
}

// dz of a piece becomes dx, given mean, x_scale, scale and shift.
template <int slots, class A, int V>
FASTBN_D void differentiate(A (&dz)[V], const A (&value)[V], const A (&z)[4][slots]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int slot = slots == 1 ? 0 : j;
    dz[j] = (dz[j] + (value[j] - z[0][slot]) * z[1][slot]) * z[2][slot] + z[3][slot];
  }
}

}  // namespace fastbn::cuda
