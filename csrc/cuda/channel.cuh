// Results of a whole channel from its moments or sums, and the coefficients of its elements.
#pragma once

#include "../core/dispatch.h"
#include "../core/formula.h"
#include "math.cuh"
#include "merge.cuh"

namespace fastbn::cuda {

// bfloat16 inputs can be so large that their squares overflow the float32 sums: a second row of the pivots holds a
// factor for the differences, a power of two.
template <class T>
constexpr int pivot_rows = std::is_same_v<T, BFloat16> ? 2 : 1;
// The largest value times the factor squares to 2^112, and values that overflowed without it keep their digits.
constexpr float factor_of_large = 0x1p-72f;

// A parameter that was loaded and not looked at yet, so that nothing waits for it: converting it would. Not wanted: in
// threads that have no channel.
struct LoadedParam {
  uint32_t low = 0, high = 0;

  FASTBN_D LoadedParam(const Param& p, int64_t i, bool wanted = true) {
    if (p.data == nullptr || !wanted) return;
    const int64_t size = size_of(p.dtype);
    const uint32_t* const words = static_cast<const uint32_t*>(p.data) + (size == 8 ? 2 * i : i);
    if (size == 2) {
      low = load(static_cast<const uint16_t*>(p.data) + i);
    } else {
      low = load(words);
      if (size == 8) high = load(words + 1);
    }
  }
  FASTBN_D double value(const Param& p, double absent) const {
    if (p.data == nullptr) return absent;
    switch (p.dtype) {  // not by way of an address, which would be one of local memory
      case DType::f64: {
        const uint64_t bits = uint64_t(high) << 32 | low;
        double x;
        memcpy(&x, &bits, 8);
        return x;
      }
      case DType::f16:
        return to_acc(Half{uint16_t(low)});
      case DType::bf16:
        return to_acc(BFloat16{uint16_t(low)});
      default:
        return detail::bits_float(low);
    }
  }
};

// The pivot is one of the first values of the tile: sums of differences from it keep the digits that sums of the values
// would lose.
template <class T, class A>
FASTBN_D void set_pivot(const Scratch<A>& scratch, int c, A value) {
  if constexpr (pivot_rows<T> == 2) scratch.at(1, c) = 1;
  scratch.at(0, c) = value - value == 0 ? value : A(0);  // an infinite pivot would spoil the sums
}

template <class T, class Access>
FASTBN_D T load_pivot(const Access& access, const T* x, int c) {
  const int64_t at = access.pivot_probe(c);
  return at < 0 ? T{} : load(x + at);
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

// The mean and M2 of a channel of a tile from its sums of differences. bad: they overflowed, or the pivot was too far
// from the mean. The pivot is then the mean found, for another attempt, in which the other channels compute the same
// sums again.
template <class T, class A>
FASTBN_D Record tile_moments(const Tile& tile, Sums sums, const Scratch<A>& scratch, int c, bool& bad) {
  // Float sums of squares lose a bit at a distance of one standard deviation, and four at four.
  constexpr double allowed = 16;
  bool overflows = false;
  if constexpr (pivot_rows<T> == 2) {
    const double factor = scratch.at(1, c);
    sums.first /= factor, sums.second /= factor * factor;
    overflows = !(sums.second - sums.second == 0) && factor == 1;
    if (overflows) scratch.at(1, c) = factor_of_large;
  }
  const Moments m = from_shifted_sums(tile.count, double(scratch.at(0, c)), sums.first, sums.second);
  const A mean = A(m.mean);
  const bool far = !pivot_was_good(tile.count, sums.first, m, allowed) && mean - mean == 0 && mean != scratch.at(0, c);
  if (far && !overflows) scratch.at(0, c) = mean;  // sums that overflowed say nothing about the pivot
  if (far || overflows) bad = true;
  return {m.mean, m.m2};
}

// Writes the moments and running statistics of a channel.
FASTBN_D void write_moments(const Forward& args, int64_t channel, double mean, double variance) {
  const int64_t channels = args.problem.shape.C;
  if (args.moments != nullptr) args.moments[channel] = mean, args.moments[channels + channel] = variance;
  if (args.training) update(args.running, channel, mean, variance, double(args.problem.shape.per_channel()));
}

template <class A>
FASTBN_D void set_normalization(double mean, double variance, double eps, double weight, double bias,
                                const Scratch<A>& scratch, int c) {
  const auto z = normalization<A>(mean, variance, eps, weight, bias);
  scratch.at(0, c) = z.mean, scratch.at(1, c) = z.scale, scratch.at(2, c) = z.shift;
}

// args: Forward, or Backward, which computes the same numbers again.
template <class Args, class A>
FASTBN_D void set_normalization(const Args& args, int64_t channel, double mean, double variance,
                                const Scratch<A>& scratch, int c) {
  const LoadedParam weight(args.weight, channel), bias(args.bias, channel);
  set_normalization(mean, variance, args.eps, weight.value(args.weight, 1), bias.value(args.bias, 0), scratch, c);
}

template <class A>
FASTBN_D void set_normalization(const Backward& args, int64_t channel, const Scratch<A>& scratch, int c) {
  set_normalization(args, channel, args.moments[channel], args.moments[args.problem.shape.C + channel], scratch, c);
}

// Kernels sum dy * (x - the mean rounded to A); this corrects the sum to the exact mean.
template <class A>
FASTBN_D Sums corrected(double mean, const Record& sums) {
  const double lost = mean - double(coefficient<A>(mean));
  return {sums.first, lost == 0 ? sums.second : sums.second - lost * sums.first};
}

// Writes the gradients of weight and bias of a channel.
FASTBN_D void write_param_grads(const Backward& args, int64_t channel, double variance, const Sums& sums) {
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
FASTBN_D void set_input_gradient(double mean, double variance, double eps, double weight, const Sums& sums,
                                 double count, const Scratch<A>& scratch, int c) {
  const auto g = input_gradient<A>(mean, variance, eps, weight, count, sums.first, sums.second);
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
