// What each pass makes of a pack: the terms of its sums, or the pack of its result. Shared by both access patterns.

// Terms a and b of the sums of a and a * b. `shifted`: the pivot is subtracted from x.
template <class T, bool is_shifted>
struct StatsOp {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = false, calls = false;
  const T* x;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  template <class IO>
  FASTBN_HD void operator()(const IO& io, int64_t i, int64_t, const S& pivot, const ForwardCoefficients<T>&, S& a,
                            S& b) const {
    a = io.template load_as<sum_t<T>>(x + i);
    for (int k = 0; shifted && k < S::vectors; ++k) a.v[k] -= pivot.v[k];
    b = a;
  }
};

// The op of the first pass over the data.
template <class T>
using FirstStatsOp = StatsOp<T, !wide_sums<T>>;

template <class T, class Epilogue, bool is_shifted>
struct BackwardReduceOp {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = Epilogue::needs_z, calls = Epilogue::calls;
  const T* x;
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  template <class IO>
  FASTBN_HD void operator()(const IO& io, int64_t i, int64_t slot, const S& pivot, const ForwardCoefficients<T>& z,
                            S& a, S& b) const {
    if constexpr (std::is_same_v<Epilogue, IdentityBackward<T>>) {
      a = io.template load_as<sum_t<T>>(epilogue.dy + i);
    } else {
      Pack<T> value{};
      if constexpr (needs_z) value = io.load(x + i);
      Vec<float> bits;
      a = lanes_of<sum_t<T>>(epilogue(io, i, slot, value, z, bits));
    }
    b = io.template load_as<sum_t<T>>(x + i);
    for (int k = 0; shifted && k < S::vectors; ++k) b.v[k] -= pivot.v[k];
  }
};

// For pivots that are all 0: worth a loop of its own.
template <class T, class Epilogue>
using UnshiftedBackwardReduceOp = BackwardReduceOp<T, Epilogue, !wide_sums<T>>;

// The normalization and its epilogue. Coefficients are one pack each, `count` of them.
template <class T, class Epilogue>
struct NormalizeOp {
  static constexpr int count = 3;  // mean, scale, shift
  const T* x;
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  FASTBN_HD void prefetch_extra(int64_t i) const { epilogue.prefetch(i); }
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t slot, const Lanes<T, acc_t<T>> (&c)[count]) const {
    Pack<T> v = io.load(x + i);
    for (int k = 0; k < v.vectors; ++k) v.v[k] = normalized<acc_t<T>>(v.v[k], c[0].v[k], c[1].v[k], c[2].v[k]);
    epilogue(io, v, i, slot);
    return v;
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
  const T* x;
  T* grad_residual;  // or nullptr
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  FASTBN_HD void prefetch_extra(int64_t) const {}
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t slot, const Lanes<T, acc_t<T>> (&c)[count]) const {
    const Pack<T> value = io.load(x + i);
    Vec<float> bits;
    Pack<T> v = epilogue(io, i, slot, value, ForwardCoefficients<T>{c[0], c[2], c[count - 1]}, bits);
    store_residual_grad<Epilogue>(io, v, bits, grad_residual, i);
    for (int k = 0; k < v.vectors; ++k) {
      v.v[k] = (v.v[k] + (value.v[k] - c[0].v[k]) * c[1].v[k]) * c[2].v[k] + c[3].v[k];
    }
    return v;
  }
};

// The gradient of the input in eval, where the statistics are constants.
template <class T, class Epilogue>
struct BackwardScaleOp {
  static constexpr int count = Epilogue::needs_z ? 3 : 1;  // scale, mean, shift of z
  const T* x;
  T* grad_residual;  // or nullptr
  Epilogue epilogue;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(epilogue.dy + i); }
  FASTBN_HD void prefetch_extra(int64_t) const {}
  FASTBN_HD bool uses_mask() const { return epilogue.uses_mask(); }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t slot, const Lanes<T, acc_t<T>> (&c)[count]) const {
    Pack<T> value{};
    if constexpr (Epilogue::needs_z) value = io.load(x + i);
    Vec<float> bits;
    Pack<T> v = epilogue(io, i, slot, value, ForwardCoefficients<T>{c[count / 2], c[0], c[count - 1]}, bits);
    store_residual_grad<Epilogue>(io, v, bits, grad_residual, i);
    for (int k = 0; k < v.vectors; ++k) v.v[k] *= c[0].v[k];
    return v;
  }
};
