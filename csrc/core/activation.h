// Activation functors: the forward value y = act(z) and the gradient dz = dy * act'(z).
// This file is included inside a namespace, on the CPU once per instruction set, so that vector code is compiled for
// it; dispatch.h includes it for scalars, in namespace fastbn.

// V is a scalar, or a SIMD vector on the CPU. M provides the math on V: of(number), exp, expm1, tanh, gauss (density
// and cdf). Choices are written with ?:, which selects per lane; a NaN has to stay a NaN.

struct Identity {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    return z;
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V, A) {
    return dy;
  }
};

// Activations whose gradient is dy or dy * param have blocked(z): true where dy is multiplied by the parameter, which
// is zero for all but leaky_relu. One bit per element is then all that the backward pass needs to know of z.
struct Relu {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    const V zero = M::of(A(0));
    return zero > z ? zero : z;
  }
  template <class V, class A>
  static FASTBN_HD auto blocked(V z, A) {
    return z <= A(0);
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    return z <= A(0) ? M::of(A(0)) : dy;
  }
};

struct LeakyRelu {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A slope) {
    return z > A(0) ? z : z * slope;
  }
  template <class V, class A>
  static FASTBN_HD auto blocked(V z, A) {
    return z <= A(0);
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A slope) {
    return z <= A(0) ? dy * slope : dy;
  }
};

struct Relu6 {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    const V zero = M::of(A(0)), six = M::of(A(6));
    const V above = zero > z ? zero : z;
    return six < above ? six : above;
  }
  template <class V, class A>
  static FASTBN_HD auto blocked(V z, A) {
    return (z <= A(0)) | (z >= A(6));
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    return blocked(z, A(0)) ? M::of(A(0)) : dy;
  }
};

struct Elu {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A alpha) {
    return z < A(0) ? M::expm1(z) * alpha : z;  // zero stays zero whatever alpha is, as in torch
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A alpha) {
    return z > A(0) ? dy : dy * (M::exp(z) * alpha);
  }
};

struct Sigmoid {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    return A(1) / (A(1) + M::exp(-z));
  }
  // s * (1 - s), written without the difference, which would cancel for large z.
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    const V t = M::exp(z > A(0) ? -z : z);
    return dy * (t / ((A(1) + t) * (A(1) + t)));
  }
};

struct Silu {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    return z / (A(1) + M::exp(-z));
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    const V t = M::exp(z > A(0) ? -z : z), part = A(1) / (A(1) + t);
    const V s = z > A(0) ? part : t * part, rest = z > A(0) ? t * part : part;  // s + rest = 1
    return dy * (s * (A(1) + z * rest));
  }
};

struct Hardswish {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    return z * Relu6::forward<M>(z + A(3), A(0)) * A(1.0 / 6);
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    const V zero = M::of(A(0)), within = z < A(3) ? dy * (z * A(1.0 / 3) + A(0.5)) : dy;
    return z <= A(-3) ? zero : within;
  }
};

struct Gelu {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    V cdf, density;
    M::gauss(z, cdf, density);
    return z * cdf;
  }
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    V cdf, density;
    M::gauss(z, cdf, density);
    return dy * (cdf + z * density);
  }
};

struct Tanh {
  template <class M, class V, class A>
  static FASTBN_HD V forward(V z, A) {
    return M::tanh(z);
  }
  // 1 - tanh^2, written without the difference.
  template <class M, class V, class A>
  static FASTBN_HD V backward(V dy, V z, A) {
    const V t = M::exp((z > A(0) ? -z : z) * A(2));
    return dy * (A(4) * t / ((A(1) + t) * (A(1) + t)));
  }
};

// Calls body with the functor of an activation.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // body runs where the caller runs
#endif
template <class Body>
FASTBN_HD auto dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::relu:
      return body(Relu{});
    case Activation::leaky_relu:
      return body(LeakyRelu{});
    case Activation::relu6:
      return body(Relu6{});
    case Activation::elu:
      return body(Elu{});
    case Activation::silu:
      return body(Silu{});
    case Activation::hardswish:
      return body(Hardswish{});
    case Activation::gelu:
      return body(Gelu{});
    case Activation::sigmoid:
      return body(Sigmoid{});
    case Activation::tanh:
      return body(Tanh{});
    default:
      return body(Identity{});
  }
}
