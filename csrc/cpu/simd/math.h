// Fused multiply-add; exp, expm1, tanh and the normal density and cdf of a SIMD vector, for core/activation.h. float32
// within a few ulp; float64 lane by lane with the C library.

// a * b + c, rounded once where the instruction set can. Explicit where results must agree in every bit: a compiler
// fuses what is in one basic block, which two loops over the same expression may differ in.
FASTBN_HD Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(FASTBN_NOT_FUSED)
  return a * b + c;
#elif FASTBN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FASTBN_HD Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(FASTBN_NOT_FUSED)
  return a * b + c;
#elif FASTBN_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

template <class A>
struct Math {
  using V = Vec<A>;
  static constexpr int lanes = vector_bytes / int(sizeof(A));

  static FASTBN_HD V of(A x) { return broadcast<A>(x); }

  static FASTBN_HD V exp(V x) {
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < lanes; ++i) x[i] = __builtin_exp(x[i]);
      return x;
    } else {
      V scale;
      const V part = expm1_of_rest(x, scale);
      return part * scale + scale;
    }
  }

  static FASTBN_HD V expm1(V x) {
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < lanes; ++i) x[i] = __builtin_expm1(x[i]);
      return x;
    } else {
      V scale;
      const V part = expm1_of_rest(x, scale);
      return part * scale + (scale - A(1));
    }
  }

  static FASTBN_HD V tanh(V x) {
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < lanes; ++i) x[i] = __builtin_tanh(x[i]);
      return x;
    } else {
      // tanh|x| = -t / (t + 2) with t = exp(-2|x|) - 1, which avoids cancellation.
      const V t = expm1((x > A(0) ? -x : x) * A(2));
      const V size = -t / (t + A(2));
      return x > A(0) ? size : -size;
    }
  }

  // cdf(x) = erfc(-x / sqrt 2) / 2, density(x) = exp(-x^2 / 2) / sqrt(2 pi)
  static FASTBN_HD void gauss(V x, V& cdf, V& density) {
    constexpr A root_of_half = A(0.70710678118654752440), height = A(0.39894228040143267794);
    const V unscaled = exp(x * x * A(-0.5));
    density = unscaled * height;
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < lanes; ++i) cdf[i] = 0.5 * __builtin_erfc(-x[i] * root_of_half);
    } else {
      // Fitted to float64 by weighted least squares until the error was even. Near zero erf(a) = a * near(a^2), within
      // 2e-9; elsewhere erfc(a) = exp(-a^2) * t * far(t) with t = 1 / (1 + a / 2), within 7e-9.
      const V a = x * root_of_half, size = a > A(0) ? a : -a, square = a * a;
      const V near =
          polynomial<7>(square, {1.1283791065216064f, -0.3761262595653534f, 0.1128358542919159f, -0.026853810995817184f,
                                 0.005188325420022011f, -0.0008010168094187975f, 7.853759598219767e-05f});
      const V t = A(1) / (A(1) + size * A(0.5));
      const V far =
          polynomial<11>(t, {0.2820947468280792f, 0.28209438920021057f, 0.24688805639743805f, 0.17519702017307281f,
                             0.0943949818611145f, -0.0629267692565918f, 0.1408546268939972f, -0.4673364758491516f,
                             0.5042716860771179f, -0.2397291660308838f, 0.044196873903274536f});
      const V tail = unscaled * (t * far) * A(0.5);
      cdf = size < A(1) ? A(0.5) + A(0.5) * (a * near) : (a > A(0) ? A(1) - tail : tail);
    }
  }

 private:
  template <int count>
  static FASTBN_HD V polynomial(V x, const A (&c)[count]) {
    V sum = of(c[count - 1]);
    for (int i = count - 2; i >= 0; --i) sum = sum * x + c[i];
    return sum;
  }

  // With x = n * log 2 + r, n an integer and |r| <= log(2) / 2: returns exp(r) - 1, and sets scale to 2^n.
  static FASTBN_HD V expm1_of_rest(V x, V& scale) {
    using I = typename VectorOf<int32_t>::type;
    // Beyond these bounds 2^n is not a normal number. A NaN passes both comparisons, and n is then arbitrary.
    x = x < A(-87) ? of(A(-87)) : x;
    x = x > A(88.3f) ? of(A(88.3f)) : x;
    constexpr A whole = A(12582912);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = x * A(1.4426950408889634f) + whole;
    const V n = shifted - whole;
    const V r = (x - n * A(0.693145751953125f)) - n * A(1.42860677e-6f);
    const V p = polynomial<6>(r, {0.5f, 0.1666666567325592f, 0.04166635870933533f, 0.008333388715982437f,
                                  0.0013940926874056458f, 0.00019846534996759146f});
    scale = (V)((I)of(A(1)) + (((I)shifted - (I)of(whole)) << 23));
    return r + r * r * p;
  }
};
