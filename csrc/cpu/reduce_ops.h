// What each pass makes of some packs: the terms of its sums, or the packs of its result. Shared by both access
// patterns. `calls`: worth several packs at once, because a function is called for them.

// Terms a and b of the sums of a and a * b. `shifted`: the pivot is subtracted from x.
template <class T, bool is_shifted>
struct StatsOp {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = false, calls = false;
  const T* x;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  template <int Packs, class IO>
  FASTBN_HD void operator()(const IO& io, const Places<Packs>& at, const S& pivot, const ForwardCoefficients<T>&,
                            S (&a)[Packs], S (&b)[Packs]) const {
    for (int p = 0; p < Packs; ++p) {
      a[p] = io.template load_as<sum_t<T>>(x + at.element(p));
      for (int k = 0; shifted && k < S::vectors; ++k) a[p].v[k] -= pivot.v[k];
      b[p] = a[p];
    }
  }
};

// The op of the first pass over the data.
template <class T>
using FirstStatsOp = StatsOp<T, !starts_at_zero<T>>;

template <class T, class Epilogue, bool is_shifted>
struct BackwardReduceOp {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = Epilogue::needs_z, calls = Epilogue::calls;
  const T* x;
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  template <int Packs, class IO>
  FASTBN_HD void operator()(const IO& io, const Places<Packs>& at, const S& pivot, const ForwardCoefficients<T>& z,
                            S (&a)[Packs], S (&b)[Packs]) const {
    if constexpr (std::is_same_v<Epilogue, IdentityBackward<T>>) {
      for (int p = 0; p < Packs; ++p) a[p] = io.template load_as<sum_t<T>>(epilogue.dy + at.element(p));
    } else {
      Pack<T> value[Packs]{}, dz[Packs];
      Vec<float> bits[Packs];
      for (int p = 0; needs_z && p < Packs; ++p) value[p] = io.load(x + at.element(p));
      output_gradients(epilogue, io, at, value, z, dz, bits);
      for (int p = 0; p < Packs; ++p) a[p] = lanes_of<sum_t<T>>(dz[p]);
    }
    for (int p = 0; p < Packs; ++p) {
      b[p] = io.template load_as<sum_t<T>>(x + at.element(p));
      for (int k = 0; shifted && k < S::vectors; ++k) b[p].v[k] -= pivot.v[k];
    }
  }
};

// For pivots that are all 0: worth a loop of its own.
template <class T, class Epilogue>
using UnshiftedBackwardReduceOp = BackwardReduceOp<T, Epilogue, !starts_at_zero<T>>;

// The normalization and its epilogue. Coefficients are one pack each, `count` of them.
template <class T, class Epilogue>
struct NormalizeOp {
  static constexpr int count = 3;  // mean, scale, shift
  static constexpr bool shifted = false, calls = Epilogue::calls;
  const T* x;
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  FASTBN_HD void prefetch_extra(int64_t i) const { epilogue.prefetch(i); }
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <int Packs, class IO>
  FASTBN_HD void operator()(const IO& io, const Places<Packs>& at, const Lanes<T, acc_t<T>> (&c)[count],
                            Pack<T> (&results)[Packs]) const {
    for (int p = 0; p < Packs; ++p) {
      Pack<T> v = io.load(x + at.element(p));
      for (int k = 0; k < v.vectors; ++k) v.v[k] = normalized<acc_t<T>>(v.v[k], c[0].v[k], c[1].v[k], c[2].v[k]);
      epilogue(io, v, at.element(p), at.slot(p));
      results[p] = v;
    }
    if constexpr (calls) epilogue.finish(results);
  }
};

// Stores dz as the gradient of the residual, if it is wanted.
template <class Epilogue, class T, class IO>
FASTBN_HD void store_residual_grad(const IO& io, const Pack<T>& dz, Vec<float> bits, T* grad_residual, int64_t i) {
  if (grad_residual != nullptr) io.store_second(Epilogue::has_bits ? bits : dz.bits(), grad_residual + i);
}

template <class T, class Epilogue>
struct BackwardElemtOp {
  static constexpr int count = Epilogue::needs_z ? 5 : 4;  // mean, x_scale, scale, shift, shift of z
  static constexpr bool shifted = false, calls = Epilogue::calls;
  const T* x;
  T* grad_residual;  // or nullptr
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  FASTBN_HD void prefetch_extra(int64_t) const {}
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <int Packs, class IO>
  FASTBN_HD void operator()(const IO& io, const Places<Packs>& at, const Lanes<T, acc_t<T>> (&c)[count],
                            Pack<T> (&results)[Packs]) const {
    Pack<T> value[Packs];
    Vec<float> bits[Packs];
    for (int p = 0; p < Packs; ++p) value[p] = io.load(x + at.element(p));
    output_gradients(epilogue, io, at, value, ForwardCoefficients<T>{c[0], c[2], c[count - 1]}, results, bits);
    for (int p = 0; p < Packs; ++p) {
      Pack<T>& v = results[p];
      store_residual_grad<Epilogue>(io, v, bits[p], grad_residual, at.element(p));
      for (int k = 0; k < v.vectors; ++k) {
        v.v[k] = multiply_add(multiply_add(value[p].v[k] - c[0].v[k], c[1].v[k], v.v[k]), c[2].v[k], c[3].v[k]);
      }
    }
  }
};

// The gradient of the input in eval, where the statistics are constants.
template <class T, class Epilogue>
struct BackwardScaleOp {
  static constexpr int count = Epilogue::needs_z ? 3 : 1;  // scale, mean, shift of z
  static constexpr bool shifted = false, calls = Epilogue::calls;
  const T* x;
  T* grad_residual;  // or nullptr
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  FASTBN_HD void prefetch_extra(int64_t) const {}
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <int Packs, class IO>
  FASTBN_HD void operator()(const IO& io, const Places<Packs>& at, const Lanes<T, acc_t<T>> (&c)[count],
                            Pack<T> (&results)[Packs]) const {
    Pack<T> value[Packs]{};
    Vec<float> bits[Packs];
    for (int p = 0; Epilogue::needs_z && p < Packs; ++p) value[p] = io.load(x + at.element(p));
    output_gradients(epilogue, io, at, value, ForwardCoefficients<T>{c[count / 2], c[0], c[count - 1]}, results, bits);
    for (int p = 0; p < Packs; ++p) {
      store_residual_grad<Epilogue>(io, results[p], bits[p], grad_residual, at.element(p));
      for (int k = 0; k < Pack<T>::vectors; ++k) results[p].v[k] *= c[0].v[k];
    }
  }
};
