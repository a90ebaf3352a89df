// Epilogues of the CPU kernels, one pack at a time: y and its mask from z in the forward pass, dz from dy in the
// backward pass. `io` loads and stores a pack, `i` is its first element, `slot` its index in the mask.

// Elements and mask slots of `Packs` packs at equal distances.
template <int Packs>
struct Places {
  static constexpr int number = Packs;
  int64_t first_element, apart, first_slot, slots_apart;
  FASTBN_HD int64_t element(int pack) const { return first_element + pack * apart; }
  FASTBN_HD int64_t slot(int pack) const { return first_slot + pack * slots_apart; }
};

// Both passes use the same operations, so that they agree on the sign of z.
template <class A>
FASTBN_HD Vec<A> normalized(Vec<A> x, Vec<A> mean, Vec<A> scale, Vec<A> shift) {
  return multiply_add(x - mean, scale, shift);
}

// One bit for each value of a pack, 1 if the activation passed it. In memory order, except for bfloat16 without
// AVX-512, which uses lane order.
template <class T>
struct Bits {
  using P = Pack<T>;
  using A = acc_t<T>;
  using Word = std::conditional_t<(P::size <= 8), uint8_t, std::conditional_t<(P::size <= 16), uint16_t, uint32_t>>;
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Truth = typename VectorOf<Lane>::type;  // result of a comparison: all ones or zero

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
  // The values of a pack, as in memory, that pass; zeros elsewhere.
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

// Activations chosen at run time, of several vectors in place. Functions of their own: inlined, every loop would
// contain all activations. For several vectors, because a call for each costs as much as the activation;
// NOTES.md#epilogue.
template <class A>
FASTBN_NOINLINE void activate(Vec<A>* z, int vectors, Activation activation, A param) {
  FASTBN_CAPABILITY::dispatch_activation(activation, [&](auto act) FASTBN_INLINE {
    for (int k = 0; k < vectors; ++k) z[k] = std::decay_t<decltype(act)>::template forward<Math<A>>(z[k], param);
  });
}
template <class A>
FASTBN_NOINLINE void activation_gradient(Vec<A>* dy, const Vec<A>* z, int vectors, Activation activation, A param) {
  FASTBN_CAPABILITY::dispatch_activation(activation, [&](auto act) FASTBN_INLINE {
    for (int k = 0; k < vectors; ++k) {
      dy[k] = std::decay_t<decltype(act)>::template backward<Math<A>>(dy[k], z[k], param);
    }
  });
}
template <class A>
FASTBN_HD auto blocked_by(Vec<A> z, Activation activation) {
  return activation == Activation::relu6 ? Relu6::blocked(z, A(0)) : Relu::blocked(z, A(0));
}

// Forward epilogues turn z into y in place. uses_mask(): it fills a mask. calls: it calls a function, `finish`, for
// several packs.
template <class T>
struct IdentityEpilogue {
  static constexpr bool calls = false;
  FASTBN_HD void prefetch(int64_t) const {}
  FASTBN_HD bool uses_mask() const { return false; }
  template <class IO>
  FASTBN_HD void operator()(const IO&, Pack<T>&, int64_t, int64_t) const {}
};

template <class T, bool with_residual>
struct ReluEpilogue {
  using A = acc_t<T>;
  static constexpr bool calls = false;
  const T* residual;
  void* mask;

  FASTBN_HD void prefetch(int64_t i) const {
    if constexpr (with_residual) fetch(residual + i);
  }
  FASTBN_HD bool uses_mask() const { return with_residual && mask != nullptr; }
  template <class IO>
  FASTBN_HD void operator()(const IO& io, Pack<T>& z, int64_t i, int64_t slot) const {
    if constexpr (with_residual) {
      const Pack<T> r = io.load(residual + i);
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
struct RuntimeEpilogue {
  using A = acc_t<T>;
  static constexpr bool calls = true;
  const T* residual;  // or nullptr
  void* mask;
  Activation activation;
  A param;

  FASTBN_HD void prefetch(int64_t i) const {
    if (residual != nullptr) fetch(residual + i);
  }
  FASTBN_HD bool uses_mask() const { return mask != nullptr; }
  template <class IO>
  FASTBN_HD void operator()(const IO& io, Pack<T>& z, int64_t i, int64_t slot) const {
    if (residual != nullptr) {
      const Pack<T> r = io.load(residual + i);
      for (int k = 0; k < z.vectors; ++k) z.v[k] += r.v[k];
    }
    if (mask != nullptr) {
      typename Bits<T>::Truth t[Pack<T>::vectors];
      for (int k = 0; k < z.vectors; ++k) t[k] = blocked_by<A>(z.v[k], activation);
      Bits<T>::store(t, mask, slot);
    }
  }
  template <int Packs>
  FASTBN_HD void finish(Pack<T> (&z)[Packs]) const {
    activate<A>(z[0].v, Packs * Pack<T>::vectors, activation, param);
  }
};

// Calls body with the forward epilogue of a call.
template <class T, class Body>
FASTBN_HD void dispatch_epilogue(const Forward& args, const Body& body) {
  const Epilogue& e = args.epilogue;
  const T* residual = static_cast<const T*>(e.residual);
  if (e.activation == Activation::identity && residual == nullptr) return body(IdentityEpilogue<T>{});
  if (e.activation == Activation::relu && residual != nullptr) return body(ReluEpilogue<T, true>{residual, args.mask});
  if (e.activation == Activation::relu && args.mask == nullptr) return body(ReluEpilogue<T, false>{nullptr, nullptr});
  body(RuntimeEpilogue<T>{residual, args.mask, e.activation, acc_t<T>(e.param)});
}

// Mean, scale and shift of the forward pass, for epilogues that recompute z.
template <class T>
struct ForwardCoefficients {
  Lanes<T, acc_t<T>> mean, scale, shift;
};

// Backward epilogues make dz from dy, and from x if needs_z. uses_mask(): it reads a mask. calls: it calls a function,
// for several packs at once, so few accumulators stay in registers. If has_bits, `bits` returns dz as stored in memory,
// which saves rounding it again.
template <class T>
struct IdentityBackward {
  static constexpr bool needs_z = false, has_bits = true, calls = false;
  const T* dy;

  FASTBN_HD bool uses_mask() const { return false; }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t, const Pack<T>&, const ForwardCoefficients<T>&,
                               Vec<float>& bits) const {
    bits = io.bits(dy + i);
    return io.load(dy + i);
  }
};

template <class T>
struct ReluBackward {
  using A = acc_t<T>;
  static constexpr bool needs_z = true, has_bits = false, calls = false;
  const T* dy;

  FASTBN_HD bool uses_mask() const { return false; }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t, const Pack<T>& x, const ForwardCoefficients<T>& c,
                               Vec<float>&) const {
    Pack<T> dz = io.load(dy + i);
    for (int k = 0; k < dz.vectors; ++k) {
      const Vec<A> z = normalized<A>(x.v[k], c.mean.v[k], c.scale.v[k], c.shift.v[k]);
      dz.v[k] = Relu::backward<Math<A>>(dz.v[k], z, A(0));
    }
    return dz;
  }
};

template <class T>
struct MaskBackward {
  using A = acc_t<T>;
  static constexpr bool needs_z = false, has_bits = true, calls = false;
  const T* dy;
  const void* mask;
  A slope;

  FASTBN_HD bool uses_mask() const { return true; }
  template <class IO>
  FASTBN_HD Pack<T> operator()(const IO& io, int64_t i, int64_t slot, const Pack<T>&, const ForwardCoefficients<T>&,
                               Vec<float>& bits) const {
    const Vec<float> all = io.bits(dy + i);
    bits = Bits<T>::passing(all, mask, slot);
    Pack<T> dz = Pack<T>::of(bits);
    if (slope != 0) {  // no product with a slope of zero: an infinite dy would become NaN
      const Pack<T> blocked = Pack<T>::of((Vec<float>)((Words)all ^ (Words)bits));
      for (int k = 0; k < dz.vectors; ++k) dz.v[k] += blocked.v[k] * slope;
      bits = dz.bits();
    }
    return dz;
  }
};

template <class T>
struct RuntimeBackward {
  using A = acc_t<T>;
  static constexpr bool needs_z = true, has_bits = false, calls = true;
  const T* dy;
  const T* residual;  // or nullptr
  Activation activation;
  A param;

  FASTBN_HD bool uses_mask() const { return false; }
  template <class IO>
  FASTBN_HD Pack<T> z(const IO& io, int64_t i, const Pack<T>& x, const ForwardCoefficients<T>& c) const {
    Pack<T> z;
    for (int k = 0; k < z.vectors; ++k) z.v[k] = normalized<A>(x.v[k], c.mean.v[k], c.scale.v[k], c.shift.v[k]);
    if (residual != nullptr) {
      const Pack<T> r = io.load(residual + i);
      for (int k = 0; k < z.vectors; ++k) z.v[k] += r.v[k];
    }
    return z;
  }
  template <int Packs>
  FASTBN_HD void finish(Pack<T> (&dz)[Packs], const Pack<T> (&z)[Packs]) const {
    activation_gradient<A>(dz[0].v, z[0].v, Packs * Pack<T>::vectors, activation, param);
  }
};

// dz of the packs at places[0], places[1], ... `bits`: see has_bits.
template <class T, int Packs, class Epilogue, class IO>
FASTBN_HD void output_gradients(const Epilogue& epilogue, const IO& io, const Places<Packs>& at,
                                const Pack<T> (&x)[Packs], const ForwardCoefficients<T>& c, Pack<T> (&dz)[Packs],
                                Vec<float> (&bits)[Packs]) {
  if constexpr (Epilogue::calls) {
    Pack<T> z[Packs];
    for (int p = 0; p < Packs; ++p)
      dz[p] = io.load(epilogue.dy + at.element(p)), z[p] = epilogue.z(io, at.element(p), x[p], c);
    epilogue.finish(dz, z);
  } else {
    for (int p = 0; p < Packs; ++p) dz[p] = epilogue(io, at.element(p), at.slot(p), x[p], c, bits[p]);
  }
}

// Calls body with the backward epilogue of a call.
template <class T, class Body>
FASTBN_HD void dispatch_backward_epilogue(const Backward& args, const Body& body) {
  using A = acc_t<T>;
  const Epilogue& e = args.epilogue;
  const T* dy = static_cast<const T*>(args.grad_output);
  if (e.activation == Activation::identity) return body(IdentityBackward<T>{dy});
  if (args.mask != nullptr) return body(MaskBackward<T>{dy, args.mask, A(e.param)});
  if (e.activation == Activation::relu && e.residual == nullptr) return body(ReluBackward<T>{dy});
  body(RuntimeBackward<T>{dy, static_cast<const T*>(e.residual), e.activation, A(e.param)});
}
