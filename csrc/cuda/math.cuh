// The math of core/activation.h on scalars, and z, with operations that are the same in every kernel.
#pragma once

#include <cmath>

#include "../core/platform.h"

namespace fastbn::cuda {

struct Math {
  template <class A>
  static FASTBN_HD A of(A x) {
    return x;
  }
  template <class A>
  static FASTBN_HD A exp(A x) {
    return std::exp(x);
  }
  template <class A>
  static FASTBN_HD A expm1(A x) {
    return std::expm1(x);
  }
  template <class A>
  static FASTBN_HD A tanh(A x) {
    return std::tanh(x);
  }
  template <class A>
  static FASTBN_HD void gauss(A z, A& cdf, A& density) {
    cdf = A(0.5) * std::erfc(z * A(-0.70710678118654752));
    density = A(0.39894228040143268) * std::exp(A(-0.5) * z * z);
  }
};

// z before the residual is added. Both passes have to agree on the sign of z, so the fused operation is explicit
// instead of left to the compiler.
template <class A>
FASTBN_HD A normalized(A x, A mean, A scale, A shift) {
  return std::fma(x - mean, scale, shift);
}

}  // namespace fastbn::cuda
