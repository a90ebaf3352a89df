// Mean and variance from partial sums, merged by Chan's formula in a fixed order.
#pragma once

#include "platform.h"

namespace fastbn {

struct Moments {
  double n, mean, m2;  // count, mean, sum of squared deviations from the mean
};

// The moments of n values x, from the sums of (x - pivot) and (x - pivot)^2.
FASTBN_HD Moments from_shifted_sums(double n, double pivot, double sum, double squares) {
  if (n == 0) return {0, 0, 0};
  const double shift = sum / n;
  const double m2 = squares - sum * shift;
  return {n, pivot + shift, m2 < 0 ? 0 : m2};  // a NaN stays a NaN
}

// A pivot far from the mean costs digits of the variance: squares and sum * shift nearly cancel. `allowed` is the
// square of the distance, in standard deviations, that the type of the sums tolerates.
FASTBN_HD bool pivot_was_good(double n, double sum, const Moments& m, double allowed) {
  return sum * sum <= allowed * n * m.m2;
}

// Chan, Golub, LeVeque 1983. A side without values returns the other one, so empty ranks need no special case.
FASTBN_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.n == 0) return a;
  if (a.n == 0) return b;
  const double n = a.n + b.n;
  const double delta = b.mean - a.mean;
  const double part = b.n / n;
  return {n, a.mean + delta * part, a.m2 + b.m2 + delta * delta * a.n * part};
}

// Merges K parts in their order; part(k) points to mean, variance and count, which are `apart` elements apart.
template <class Part>
FASTBN_HD Moments merged(int64_t K, int64_t apart, const Part& part) {
  Moments all{};
  for (int64_t k = 0; k < K; ++k) {
    const double* const p = part(k);
    all = merge(all, {p[2 * apart], p[0], p[apart] * p[2 * apart]});
  }
  return all;
}

}  // namespace fastbn
