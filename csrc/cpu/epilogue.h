// In: z of the forward pass, or the gradient of y. Out: y and its mask, or dz: what batch norm ends with, a pack at a
// time. `access` says how a pack is read and written, `i` is its first element, `slot` its place in the mask.

// The same operations in both passes: whether z is above zero must not depend on the pass.
template <class A>
FASTBN_HD Vec<A> normalized(Vec<A> x, Vec<A> mean, Vec<A> scale, Vec<A> shift) {
  return (x - mean) * scale + shift;
}

// One bit for each value of a pack: whether an activation let it pass. In the order of memory; but those of a pack of
// bfloat16 in the order of its lanes, without AVX-512.
template <class T>
struct Bits {
  using P = Pack<T>;
  using A = acc_t<T>;
  using Word = std::conditional_t<(P::size <= 8), uint8_t, std::conditional_t<(P::size <= 16), uint16_t, uint32_t>>;
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Truth = typename VectorOf<Lane>::type;  // of a comparison: all ones, or zero

  static FASTBN_HD uint32_t gather(Truth t) {
#if FASTBN_VECTOR_BYTES == 64
    return sizeof(A) == 8 ? uint32_t(_mm512_movepi64_mask((__m512i)t)) : uint32_t(_mm512_movepi32_mask((__m512i)t));
#elif FASTBN_VECTOR_BYTES == 32
    return uint32_t(sizeof(A) == 8 ? _mm256_movemask_pd((__m256d)t) : _mm256_movemask_ps((__m256)t));
#elif defined(__SSE2__)
    return uint32_t(sizeof(A) == 8 ? _mm_movemask_pd((__m128d)t) : _mm_movemask_ps((__m128)t));
#elif defined(__aarch64__)
    // NEON has no such instruction: keep lane i's bit i, and add the lanes.
    if constexpr (sizeof(A) == 8) return uint32_t(vaddvq_u64((uint64x2_t)t & uint64x2_t{1, 2}));
    return vaddvq_u32((uint32x4_t)t & uint32x4_t{1, 2, 4, 8});
#else
    uint32_t bits = 0;
    for (int i = 0; i < P::lanes; ++i) bits |= uint32_t(t[i] != 0) << i;
    return bits;
#endif
  }
  static FASTBN_HD void store(const Truth (&blocked)[P::vectors], void* mask, int64_t slot) {
    uint32_t bits = 0;
#if FASTBN_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, BFloat16>) {
      bits = _pdep_u32(gather(blocked[0]), 0x55555555u) | _pdep_u32(gather(blocked[1]), 0xaaaaaaaau);
    } else
#endif
    {
      for (int k = 0; k < P::vectors; ++k) bits |= gather(blocked[k]) << (k * P::lanes);
    }
    static_cast<Word*>(mask)[slot] = Word(~bits);
  }
  // Of a pack as it is in memory, what passes; zeros in place of the rest.
  static FASTBN_HD Vec<float> passing(Vec<float> pack, const void* mask, int64_t slot) {
    const Word bits = static_cast<const Word*>(mask)[slot];
#if FASTBN_VECTOR_BYTES == 64
    const __m512i all = (__m512i)pack;
    if constexpr (sizeof(T) == 2) return (Vec<float>)_mm512_maskz_mov_epi16(bits, all);
    if constexpr (sizeof(T) == 4) return (Vec<float>)_mm512_maskz_mov_epi32(bits, all);
    if constexpr (sizeof(T) == 8) return (Vec<float>)_mm512_maskz_mov_epi64(bits, all);
#else
    using Element =
        std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    using Elements = typename VectorOf<Element>::type;
    Elements bit;
    for (int i = 0; i < P::size; ++i) {
      bit[i] = Element(Element(1) << (std::is_same_v<T, BFloat16> ? i / 2 + i % 2 * P::lanes : i));
    }
    return (Vec<float>)((Elements)pack & (Elements)((broadcast<Element>(bits) & bit) == bit));
#endif
  }
};

// Activations that are known at run time. Calls, because a choice in every loop would make each of them as long as all
// activations together; what they cost is little beside an exp.
template <class A>
FASTBN_NOINLINE Vec<A> activate(Vec<A> z, Activation activation, A param) {
  return FASTBN_CAPABILITY::dispatch_activation(activation, [&](auto act) FASTBN_INLINE {
    return std::decay_t<decltype(act)>::template forward<Math<A>>(z, param);
  });
}
template <class A>
FASTBN_NOINLINE Vec<A> activation_gradient(Vec<A> dy, Vec<A> z, Activation activation, A param) {
  return FASTBN_CAPABILITY::dispatch_activation(activation, [&](auto act) FASTBN_INLINE {
    return std::decay_t<decltype(act)>::template backward<Math<A>>(dy, z, param);
  });
}
// For activations that have a mask.
template <class A>
FASTBN_HD auto blocked_by(Vec<A> z, Activation activation) {
  return activation == Activation::relu6 ? Relu6::blocked(z, A(0)) : Relu::blocked(z, A(0));
}

// What makes y of z, in place. in_slots(): it fills a mask. calls: a function for each vector, so that it gains nothing
// from loops that take several packs at once.
template <class T>
struct Plain {
  static constexpr bool calls = false;

  FASTBN_HD void prefetch(int64_t) const {}
  FASTBN_HD bool in_slots() const { return false; }
  template <class Access>
  FASTBN_HD void operator()(const Access&, Pack<T>&, int64_t, int64_t) const {}
};

template <class T, bool with_residual>
struct Rectified {
  using A = acc_t<T>;
  static constexpr bool calls = false;
  const T* residual;
  void* mask;

  FASTBN_HD void prefetch(int64_t i) const {
    if constexpr (with_residual) fetch(residual + i);
  }
  FASTBN_HD bool in_slots() const { return with_residual && mask != nullptr; }
  template <class Access>
  FASTBN_HD void operator()(const Access& access, Pack<T>& z, int64_t i, int64_t slot) const {
    if constexpr (with_residual) {
      const Pack<T> r = access.load(residual + i);
      for (int k = 0; k < z.vectors; ++k) z.v[k] += r.v[k];
      if (mask != nullptr) {
        typename Bits<T>::Truth t[Pack<T>::vectors];
        for (int k = 0; k < z.vectors; ++k) t[k] = Relu::blocked(z.v[k], A(0));
        Bits<T>::store(t, mask, slot);
      }
    }
    for (auto& v : z.v) v = Relu::forward<Math<A>>(v, A(0));
  }
};

template <class T>
struct Activated {
  using A = acc_t<T>;
  static constexpr bool calls = true;
  const T* residual;  // or nullptr
  void* mask;
  Activation activation;
  A param;

  FASTBN_HD void prefetch(int64_t i) const {
    if (residual != nullptr) fetch(residual + i);
  }
  FASTBN_HD bool in_slots() const { return mask != nullptr; }
  template <class Access>
  FASTBN_HD void operator()(const Access& access, Pack<T>& z, int64_t i, int64_t slot) const {
    if (residual != nullptr) {
      const Pack<T> r = access.load(residual + i);
      for (int k = 0; k < z.vectors; ++k) z.v[k] += r.v[k];
    }
    if (mask != nullptr) {
      typename Bits<T>::Truth t[Pack<T>::vectors];
      for (int k = 0; k < z.vectors; ++k) t[k] = blocked_by<A>(z.v[k], activation);
      Bits<T>::store(t, mask, slot);
    }
    for (auto& v : z.v) v = activate<A>(v, activation, param);
  }
};

// body(what makes y of z) for the epilogue of a forward pass.
template <class T, class Body>
FASTBN_HD void with_end(const Forward& args, const Body& body) {
  const Epilogue& e = args.epilogue;
  const T* residual = static_cast<const T*>(e.residual);
  if (e.activation == Activation::identity && residual == nullptr) {
    body(Plain<T>{});
  } else if (e.activation == Activation::relu && residual == nullptr && args.mask == nullptr) {
    body(Rectified<T, false>{nullptr, nullptr});
  } else if (e.activation == Activation::relu && residual != nullptr) {
    body(Rectified<T, true>{residual, args.mask});
  } else {
    body(Activated<T>{residual, args.mask, e.activation, acc_t<T>(e.param)});
  }
}

// Mean, scale and shift of the forward pass, for those that make z once more.
template <class T>
struct ForZ {
  Lanes<T, acc_t<T>> mean, scale, shift;
};

// What makes dz: from dy, and x where it needs z. in_slots(): it reads a mask. calls: as above. bits: dz as it is in
// memory, of those that have_bits, where that is less work than to round dz.
template <class T>
struct PlainGradient {
  static constexpr bool needs_z = false, has_bits = true, calls = false;
  const T* dy;

  FASTBN_HD bool in_slots() const { return false; }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t, const Pack<T>&, const ForZ<T>&,
                               Vec<float>& bits) const {
    bits = access.bits(dy + i);
    return access.load(dy + i);
  }
};

template <class T>
struct RectifiedGradient {
  using A = acc_t<T>;
  static constexpr bool needs_z = true, has_bits = false, calls = false;
  const T* dy;

  FASTBN_HD bool in_slots() const { return false; }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t, const Pack<T>& x, const ForZ<T>& c,
                               Vec<float>&) const {
    Pack<T> dz = access.load(dy + i);
    for (int k = 0; k < dz.vectors; ++k) {
      const Vec<A> z = normalized<A>(x.v[k], c.mean.v[k], c.scale.v[k], c.shift.v[k]);
      dz.v[k] = Relu::backward<Math<A>>(dz.v[k], z, A(0));
    }
    return dz;
  }
};

template <class T>
struct MaskedGradient {
  using A = acc_t<T>;
  static constexpr bool needs_z = false, has_bits = true, calls = false;
  const T* dy;
  const void* mask;
  A slope;

  FASTBN_HD bool in_slots() const { return true; }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t slot, const Pack<T>&, const ForZ<T>&,
                               Vec<float>& bits) const {
    const Vec<float> all = access.bits(dy + i);
    bits = Bits<T>::passing(all, mask, slot);
    Pack<T> dz = Pack<T>::of(bits);
    if (slope != 0) {  // not by a product with a slope of zero: an infinite dy would become a NaN
      const Pack<T> blocked = Pack<T>::of((Vec<float>)((Words)all ^ (Words)bits));
      for (int k = 0; k < dz.vectors; ++k) dz.v[k] += blocked.v[k] * slope;
      bits = dz.bits();
    }
    return dz;
  }
};

template <class T>
struct ActivatedGradient {
  using A = acc_t<T>;
  static constexpr bool needs_z = true, has_bits = false, calls = true;
  const T* dy;
  const T* residual;  // or nullptr
  Activation activation;
  A param;

  FASTBN_HD bool in_slots() const { return false; }
  template <class Access>
  FASTBN_HD Pack<T> operator()(const Access& access, int64_t i, int64_t, const Pack<T>& x, const ForZ<T>& c,
                               Vec<float>&) const {
    Pack<T> dz = access.load(dy + i), z;
    for (int k = 0; k < dz.vectors; ++k) z.v[k] = normalized<A>(x.v[k], c.mean.v[k], c.scale.v[k], c.shift.v[k]);
    if (residual != nullptr) {
      const Pack<T> r = access.load(residual + i);
      for (int k = 0; k < dz.vectors; ++k) z.v[k] += r.v[k];
    }
    for (int k = 0; k < dz.vectors; ++k) dz.v[k] = activation_gradient<A>(dz.v[k], z.v[k], activation, param);
    return dz;
  }
};

// body(what makes dz) for the epilogue of a backward pass.
template <class T, class Body>
FASTBN_HD void with_source(const Backward& args, const Body& body) {
  using A = acc_t<T>;
  const Epilogue& e = args.epilogue;
  const T* dy = static_cast<const T*>(args.grad_output);
  if (e.activation == Activation::identity) {
    body(PlainGradient<T>{dy});
  } else if (args.mask != nullptr) {
    body(MaskedGradient<T>{dy, args.mask, A(e.param)});
  } else if (e.activation == Activation::relu && e.residual == nullptr) {
    body(RectifiedGradient<T>{dy});
  } else {
    body(ActivatedGradient<T>{dy, static_cast<const T*>(e.residual), e.activation, A(e.param)});
  }
}
