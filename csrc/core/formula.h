// In: moments, sums and parameters of a channel. Out: the per-element coefficients, for both backends.
#pragma once

#include <cmath>

#include "platform.h"

namespace fastbn {

// A coefficient in A. A NaN gets the plain payload: what rounds vectors to bfloat16 counts on finding no other.
// Choices here and below are between values that are made anyway: loops over channels become vectors so.
template <class A>
FASTBN_HD A coefficient(double x) {
  const A rounded = A(x);
  return x == x ? rounded : A(__builtin_nanf(""));
}

FASTBN_HD double reciprocal_std(double variance, double eps) {
#if defined(__CUDA_ARCH__)
  return rsqrt(variance + eps);  // within an ulp, at half the registers
#else
  return 1.0 / sqrt(variance + eps);
#endif
}

// y = (x - mean) * scale + shift. The mean is subtracted first: folded into the shift it would cost
// |mean| / std of the digits. What is lost by rounding the mean to A goes into the shift instead, so that a
// channel with mean 1e4 and std 1 keeps all its digits, at no cost per element.
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
