// The formulas of batch norm: per-element coefficients from the moments, sums and parameters of a channel.
#pragma once

#include <cmath>

#include "platform.h"

namespace fastbn {

// A coefficient rounded to A. A NaN gets the default payload, on which the vectorized rounding to bfloat16 relies.
// Written as a select, here and below, so that loops over channels vectorize.
template <class A>
FASTBN_HD A coefficient(double x) {
  const A rounded = A(x);
  return x == x ? rounded : A(__builtin_nanf(""));
}

FASTBN_HD double reciprocal_std(double variance, double eps) {
#if defined(__CUDA_ARCH__)
  return rsqrt(variance + eps);  // within one ulp, with half the registers
#else
  return 1.0 / sqrt(variance + eps);
#endif
}

// y = (x - mean) * scale + shift. The mean is subtracted first: merged into the shift it would cost |mean| / std of the
// digits. The rounding error of the mean goes into the shift, so that a channel with mean 1e4 and std 1 keeps all its
// digits at no cost per element.
template <class A>
struct Normalization {
  A mean, scale, shift;
};

template <class A>
FASTBN_HD Normalization<A> normalization(double mean, double variance, double eps, double weight, double bias) {
  const double scale = weight * reciprocal_std(variance, eps);
  const A rounded = coefficient<A>(mean);
  const double lost = mean - double(rounded);
  const double shifted = bias - lost * scale;
  return {rounded, coefficient<A>(scale), coefficient<A>(lost == 0 ? bias : shifted)};
}

// dx = (dy + (x - mean) * x_scale) * scale + shift (Ioffe & Szegedy 2015, section 3, solved for dx):
// dx = g * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n), g = weight * rstd. In eval the statistics are constants
// and dx = g * dy. The factor g stays outside: g * rstd^2, inside, would underflow where values are about 1e15.
template <class A>
struct InputGradient {
  A mean, x_scale, scale, shift;
};

// sum and dot are sums over the channel of dy and of dy * (x - mean).
template <class A>
FASTBN_HD InputGradient<A> input_gradient(double mean, double variance, double eps, double weight, double n, double sum,
                                          double dot) {
  const double rstd = reciprocal_std(variance, eps);
  const double g = weight * rstd;
  const double x_scale = -rstd * (rstd * dot / n);
  const A rounded = coefficient<A>(mean);
  const double lost = mean - double(rounded);
  const double lost_part = lost * x_scale;
  const double shift = -g * (sum / n + (lost == 0 ? 0 : lost_part));
  return {rounded, coefficient<A>(x_scale), coefficient<A>(g), coefficient<A>(shift)};
}

}  // namespace fastbn
