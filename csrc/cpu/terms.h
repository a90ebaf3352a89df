// In: packs of the tensors and coefficients of their channels. Out: what each pass makes of a pack: terms of its sums,
// or the pack of its result. The same for both walks.

// Terms a and b of the sums of a and of a * b. `shifted`: by a pivot, which is subtracted from x.
template <class T, bool is_shifted>
struct Deviations {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = false, calls = false;
  const T* x;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  template <class Access>
  FASTBN_HD void operator()(const Access& access, int64_t i, int64_t, const S& pivot, const ForZ<T>&, S& a,
                            S& b) const {
    a = access.template load_as<sum_t<T>>(x + i);
    for (int k = 0; shifted && k < S::vectors; ++k) a.v[k] -= pivot.v[k];
    b = a;
  }
};

// Of the first reading.
template <class T>
using FirstDeviations = Deviations<T, !wide_sums<T>>;

template <class T, class Source, bool is_shifted>
struct GradTerms {
  static constexpr bool shifted = is_shifted;
  using S = Lanes<T, sum_t<T>>;
  static constexpr bool needs_z = Source::needs_z, calls = Source::calls;
  const T* x;
  Source source;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(source.dy + i); }
  template <class Access>
  FASTBN_HD void operator()(const Access& access, int64_t i, int64_t slot, const S& pivot, const ForZ<T>& z, S& a,
                            S& b) const {
    if constexpr (std::is_same_v<Source, PlainGradient<T>>) {
      a = access.template load_as<sum_t<T>>(source.dy + i);
    } else {
      Pack<T> value{};
      if constexpr (needs_z) value = access.load(x + i);
      Vec<float> bits;
      a = lanes_of<sum_t<T>>(source(access, i, slot, value, z, bits));
    }
    b = access.template load_as<sum_t<T>>(x + i);
    for (int k = 0; shifted && k < S::vectors; ++k) b.v[k] -= pivot.v[k];
  }
};

// Where all pivots are 0: not to subtract them is worth code of its own where that is all there is to do.
template <class T, class Source>
using PlainGradTerms = GradTerms<T, Source, !wide_sums<T> || Source::calls>;

// Coefficients are one pack each, `count` of them.
template <class T, class End>
struct Apply {
  static constexpr int count = 3;  // mean, scale, shift
  static constexpr bool calls = End::calls;
  const T* x;
  End end;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i); }
  FASTBN_HD void prefetch_beside(int64_t i) const { end.prefetch(i); }
  FASTBN_HD bool in_slots() const { return end.in_slots(); }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t slot,
                               const Lanes<T, acc_t<T>> (&c)[count]) const {
    Pack<T> v = access.load(x + i);
    for (int k = 0; k < v.vectors; ++k) v.v[k] = normalized<acc_t<T>>(v.v[k], c[0].v[k], c[1].v[k], c[2].v[k]);
    end(access, v, i, slot);
    return v;
  }
};

// dz to the gradient of the residual, if there is one.
template <class Source, class T, class Access>
FASTBN_HD void keep(const Access& access, const Pack<T>& dz, Vec<float> bits, T* grad_residual, int64_t i) {
  if (grad_residual != nullptr) access.store_beside(Source::has_bits ? bits : dz.bits(), grad_residual + i);
}

template <class T, class Source>
struct GradApply {
  static constexpr int count = Source::needs_z ? 5 : 4;  // mean, x_scale, scale, shift, shift of z
  static constexpr bool calls = Source::calls;
  const T* x;
  T* grad_residual;  // or nullptr
  Source source;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(source.dy + i); }
  FASTBN_HD void prefetch_beside(int64_t) const {}
  FASTBN_HD bool in_slots() const { return source.in_slots(); }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t slot,
                               const Lanes<T, acc_t<T>> (&c)[count]) const {
    const Pack<T> value = access.load(x + i);
    Vec<float> bits;
    Pack<T> v = source(access, i, slot, value, ForZ<T>{c[0], c[2], c[count - 1]}, bits);
    keep<Source>(access, v, bits, grad_residual, i);
    for (int k = 0; k < v.vectors; ++k) {
      v.v[k] = (v.v[k] + (value.v[k] - c[0].v[k]) * c[1].v[k]) * c[2].v[k] + c[3].v[k];
    }
    return v;
  }
};

// The gradient of the input in eval, where the statistics are constants.
template <class T, class Source>
struct ScaleOnly {
  static constexpr int count = Source::needs_z ? 3 : 1;  // scale, mean, shift of z
  static constexpr bool calls = Source::calls;
  const T* x;
  T* grad_residual;  // or nullptr
  Source source;

  FASTBN_HD void prefetch(int64_t i) const { fetch(x + i), fetch(source.dy + i); }
  FASTBN_HD void prefetch_beside(int64_t) const {}
  FASTBN_HD bool in_slots() const { return source.in_slots(); }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t slot,
                               const Lanes<T, acc_t<T>> (&c)[count]) const {
    Pack<T> value{};
    if constexpr (Source::needs_z) value = access.load(x + i);
    Vec<float> bits;
    Pack<T> v = source(access, i, slot, value, ForZ<T>{c[count / 2], c[0], c[count - 1]}, bits);
    keep<Source>(access, v, bits, grad_residual, i);
    for (int k = 0; k < v.vectors; ++k) v.v[k] *= c[0].v[k];
    return v;
  }
};
