// Results of a whole channel from its moments or sums, and the coefficients of its elements.
#pragma once

#include "../core/dispatch.h"
#include "../core/formula.h"
#include "math.cuh"
#include "reduce.cuh"

namespace fastbn::cuda {

// bfloat16 inputs can be so large that their squares overflow the float32 sums: a second row of the pivots holds a
// factor for the differences, a power of two.
template <class T>
constexpr int pivot_rows = std::is_same_v<T, BFloat16> ? 2 : 1;
// The largest value times the factor squares to 2^112, and values that overflowed without it keep their digits.
constexpr float factor_of_large = 0x1p-72f;

// The pivot: one of the first values of the tile. Sums of differences from it keep the digits that sums of the values
// would lose.
template <class T, class Access, class A>
FASTBN_D void choose_pivots(const Access& access, const T* x, const Scratch<A>& scratch, int channels) {
  if (const int c = int(threadIdx.x); c < channels) {
    const int64_t at = access.pivot_probe(c);
    const A value = at < 0 ? A(0) : to_acc(load(x + at));
    if constexpr (pivot_rows<T> == 2) scratch.at(1, c) = 1;
    scratch.at(0, c) = value - value == 0 ? value : A(0);  // an infinite pivot would spoil the sums
  }
  __syncthreads();
}

// x - pivot, in the type of the sums.
template <class T, int slots, class A>
FASTBN_D sum_t<T, slots> difference(A x, const A (&pivot)[pivot_rows<T>][slots], int slot) {
  using S = sum_t<T, slots>;
  if constexpr (pivot_rows<T> == 2) {
    return std::fma(x, pivot[1][slot], -pivot[0][slot] * pivot[1][slot]);
  } else {
    return S(x) - S(pivot[0][slot]);
  }
}

// Attempts at the sums of a tile: again with the factor if they overflow, and with another pivot if it was far from the
// mean.
template <class T>
constexpr int attempts = 1 + pivot_rows<T>;

// The moments of a tile from its sums of differences, to scratch.partial. True if they overflowed or if a pivot was too
// far from the mean: its pivot is then the mean found, for another attempt, in which the other channels compute the
// same sums again. All threads call it.
template <class T, class A>
FASTBN_D bool tile_moments(const Tile& tile, const Scratch<A>& scratch) {
  // Float sums of squares lose a bit at a distance of one standard deviation, and four at four.
  constexpr double allowed = 16;
  const int c = int(threadIdx.x);
  Moments m{};
  bool bad = false;
  if (c < tile.channels) {
    Sums sums = scratch.template partial<Sums>(c);
    bool overflows = false;
    if constexpr (pivot_rows<T> == 2) {
      const double factor = scratch.at(1, c);
      sums.first /= factor, sums.second /= factor * factor;
      overflows = !(sums.second - sums.second == 0) && factor == 1;
      if (overflows) scratch.at(1, c) = factor_of_large;
    }
    m = from_shifted_sums(tile.count, double(scratch.at(0, c)), sums.first, sums.second);
    const A mean = A(m.mean);
    bad = !pivot_was_good(tile.count, sums.first, m, allowed) && mean - mean == 0 && mean != scratch.at(0, c);
    if (overflows) bad = true, m.mean = scratch.at(0, c);  // the sums say nothing about the pivot
  }
  __syncthreads();  // the partial results overwrite the sums
  if (c < tile.channels) {
    scratch.template partial<Moments>(c) = m;
    if (bad) scratch.at(0, c) = A(m.mean);
  }
  return __syncthreads_or(bad) != 0;
}

// Writes the moments and running statistics of a channel.
FASTBN_D void write_moments(const Forward& args, int64_t channel, double mean, double variance) {
  const int64_t channels = args.problem.shape.C;
  if (args.moments != nullptr) args.moments[channel] = mean, args.moments[channels + channel] = variance;
  if (args.training) update(args.running, channel, mean, variance, double(args.problem.shape.per_channel()));
}

// args: Forward, or Backward, which computes the same numbers again.
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

// Kernels sum dy * (x - the mean rounded to A); this corrects the sum to the exact mean.
template <class A>
FASTBN_D Sums corrected(const Backward& args, int64_t channel, const Sums& sums) {
  const double mean = args.moments[channel];
  const double lost = mean - double(coefficient<A>(mean));
  return {sums.first, lost == 0 ? sums.second : sums.second - lost * sums.first};
}

// Writes the gradients of weight and bias of a channel.
FASTBN_D void write_param_grads(const Backward& args, int64_t channel, const Sums& sums) {
  const double variance = args.moments[args.problem.shape.C + channel];
  write(args.grad_weight, channel, sums.second * reciprocal_std(variance, args.eps));
  write(args.grad_bias, channel, sums.first);
}

// The global sums of a channel.
FASTBN_D Sums total_sums(const Backward& args, int64_t channel) {
  const int64_t channels = args.problem.shape.C;
  const double variance = args.moments[channels + channel];
  return {args.global_sums[channels + channel], args.global_sums[channel] / reciprocal_std(variance, args.eps)};
}

// count: the number of values behind the sums.
template <class A>
FASTBN_D void set_input_gradient(const Backward& args, int64_t channel, const Sums& sums, double count,
                                 const Scratch<A>& scratch, int c) {
  const int64_t channels = args.problem.shape.C;
  const auto g = input_gradient<A>(args.moments[channel], args.moments[channels + channel], args.eps,
                                   read(args.weight, channel, 1), count, sums.first, sums.second);
  scratch.at(0, c) = g.mean, scratch.at(1, c) = g.x_scale, scratch.at(2, c) = g.scale, scratch.at(3, c) = g.shift;
}

// With an activation chosen at run time the largest one needs the registers that the coefficients of several slots
// would take: they are loaded again for each span.
template <class Access, class Epilogue>
constexpr bool reloads_coefficients = Epilogue::any && Access::slots > 1;

// Loads the first `rows` coefficients for each slot of this thread.
template <int rows, class Access, class A>
FASTBN_D void load_coefficients(const Access& access, const Scratch<A>& scratch, A (&out)[rows][Access::slots]) {
#pragma unroll
  for (int k = 0; k < rows; ++k) {
#pragma unroll
    for (int j = 0; j < Access::slots; ++j) out[k][j] = 0;
  }
  access.each_slot([&](int slot, int channel) {
#pragma unroll
    for (int k = 0; k < rows; ++k) out[k][slot] = scratch.at(k, channel);
  });
}

// value becomes z before the residual, given mean, scale and shift.
template <int slots, class A, int V>
FASTBN_D void normalize_elements(A (&value)[V], const A (&z)[3][slots]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int slot = slots == 1 ? 0 : j;
    value[j] = normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
  }
}

// dz becomes dx, given mean, x_scale, scale and shift.
template <int slots, class A, int V>
FASTBN_D void differentiate(A (&dz)[V], const A (&value)[V], const A (&z)[4][slots]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int slot = slots == 1 ? 0 : j;
    dz[j] = (dz[j] + (value[j] - z[0][slot]) * z[1][slot]) * z[2][slot] + z[3][slot];
  }
}

}  // namespace fastbn::cuda
