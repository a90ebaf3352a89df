// In: values in memory. Out: one vector register of memory, widened to vectors of the accumulation type.
// Included once per instruction set, inside its namespace; GCC vector extensions do the arithmetic.

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(FASTBN_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

constexpr int vector_bytes = FASTBN_VECTOR_BYTES;

template <class V>
FASTBN_HD V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FASTBN_HD void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Past the cache: saves reading the line that is about to be overwritten. p is aligned to the vector.
FASTBN_HD void stream_bits(void* p, Vec<float> v) {
#if FASTBN_VECTOR_BYTES == 64
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif FASTBN_VECTOR_BYTES == 32
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  store_bits(p, v);
#endif
}

template <class A>
FASTBN_HD Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

using Words = VectorOf<uint32_t>::type;
using SignedWords = VectorOf<int32_t>::type;
typedef uint16_t HalfWords __attribute__((vector_size(FASTBN_VECTOR_BYTES / 2)));

// The two conversions below are written out because GCC 12 takes __builtin_convertvector apart at this width.
FASTBN_HD Vec<float> widen(const BFloat16* p) {
#if FASTBN_VECTOR_BYTES == 64
  const Words words = (Words)_mm512_cvtepu16_epi32(load_bits<__m256i>(p));
#elif FASTBN_VECTOR_BYTES == 32
  const Words words = (Words)_mm256_cvtepu16_epi32(load_bits<__m128i>(p));
#else
  const Words words = __builtin_convertvector(load_bits<HalfWords>(p), Words);
#endif
  return (Vec<float>)(words << 16);
}
FASTBN_HD Vec<float> widen(const Half* p) {
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(load_bits<__m256i>(p));
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  Vec<float> v;
  for (int i = 0; i < vector_bytes / 4; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

// To nearest even, into the upper half of each word. No NaN can overflow into another number: those that
// arithmetic makes, that come from a bfloat16 input and that formula.h lets pass all have a zero lower half.
FASTBN_HD SignedWords round_to_bfloat16(Vec<float> v) {
  const Words u = (Words)v;
  return (SignedWords)(u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
// Two vectors of floats as one vector of half the element size, in order.
FASTBN_HD Vec<float> narrow(Vec<float> a, Vec<float> b, BFloat16*) {
  const SignedWords x = round_to_bfloat16(a), y = round_to_bfloat16(b);
#if FASTBN_VECTOR_BYTES == 64
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (Vec<float>)_mm512_permutexvar_epi64(order, _mm512_packs_epi32((__m512i)x, (__m512i)y));
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x, (__m256i)y), 0xd8);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_packs_epi32((__m128i)x, (__m128i)y);
#else
  const HalfWords h[2] = {__builtin_convertvector((Words)x, HalfWords), __builtin_convertvector((Words)y, HalfWords)};
  return load_bits<Vec<float>>(h);
#endif
}
FASTBN_HD Vec<float> narrow(Vec<float> a, Vec<float> b, Half*) {
#if FASTBN_VECTOR_BYTES == 64
  const __m256i h[2] = {_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT),
                        _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT)};
  return (Vec<float>)_mm512_inserti64x4(_mm512_castsi256_si512(h[0]), h[1], 1);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_set_m128i(_mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT),
                                      _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
#else
  constexpr int lanes = vector_bytes / 4;
  Half h[2 * lanes];
  for (int i = 0; i < lanes; ++i) h[i] = from_acc<Half>(a[i]), h[lanes + i] = from_acc<Half>(b[i]);
  return load_bits<Vec<float>>(h);
#endif
}

// One vector register of memory: `size` values of T, as one vector of float or double, or two of float.
template <class T>
struct Pack {
  using A = acc_t<T>;
  static constexpr int size = vector_bytes / sizeof(T);
  static constexpr int vectors = sizeof(A) / sizeof(T);
  static constexpr int lanes = size / vectors;
  Vec<A> v[vectors];

  static FASTBN_HD Pack load(const T* p) {
    Pack r;
    if constexpr (vectors == 1) {
      r.v[0] = load_bits<Vec<A>>(p);
    } else {
      r.v[0] = widen(p), r.v[1] = widen(p + lanes);
    }
    return r;
  }
  FASTBN_HD Vec<float> bits() const {
    if constexpr (vectors == 1) {
      return (Vec<float>)v[0];
    } else {
      return narrow(v[0], v[1], (T*)nullptr);
    }
  }
  FASTBN_HD void store(T* p) const { store_bits(p, bits()); }
  FASTBN_HD void stream(T* p) const { stream_bits(p, bits()); }
  // n < size values, the others zero
  static FASTBN_HD Pack load_some(const T* p, int64_t n) {
    T buffer[size] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  FASTBN_HD void store_some(T* p, int64_t n) const {
    T buffer[size];
    store(buffer);
    memcpy(p, buffer, n * sizeof(T));
  }
};

// As many values of E as a Pack<T> holds values.
template <class T, class E>
struct Lanes {
  static constexpr int vectors = Pack<T>::size * int(sizeof(E)) / vector_bytes;
  static constexpr int lanes = vector_bytes / int(sizeof(E));
  Vec<E> v[vectors];

  static FASTBN_HD Lanes load(const E* p) {
    Lanes r;
    for (int i = 0; i < vectors; ++i) r.v[i] = load_bits<Vec<E>>(p + i * lanes);
    return r;
  }
  FASTBN_HD void store(E* p) const {
    for (int i = 0; i < vectors; ++i) store_bits(p + i * lanes, v[i]);
  }
};

// The same values in double, which is exact.
template <class T>
FASTBN_HD Lanes<T, double> in_double(const Pack<T>& pack) {
  Lanes<T, double> r;
  if constexpr (sizeof(acc_t<T>) == 8) {
    r.v[0] = pack.v[0];
  } else {
    for (int k = 0; k < Pack<T>::vectors; ++k) {
#if FASTBN_VECTOR_BYTES == 64
      r.v[2 * k] = (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)pack.v[k]));
      r.v[2 * k + 1] = (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)pack.v[k], 1));
#elif FASTBN_VECTOR_BYTES == 32
      r.v[2 * k] = (Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)pack.v[k]));
      r.v[2 * k + 1] = (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)pack.v[k], 1));
#else
      typedef float HalfVec __attribute__((vector_size(FASTBN_VECTOR_BYTES / 2)));
      HalfVec h[2];
      __builtin_memcpy(h, &pack.v[k], sizeof(h));
      for (int i = 0; i < 2; ++i) r.v[2 * k + i] = __builtin_convertvector(h[i], Vec<double>);
#endif
    }
  }
  return r;
}

// Lane i is kept where `first <= i` counts over the whole pack; the others become zero.
template <class T>
FASTBN_HD void keep_from(Pack<T>& pack, int64_t first) {
  using A = acc_t<T>;
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Index = typename VectorOf<I>::type;
  for (int k = 0; k < Pack<T>::vectors; ++k) {
    Index index;
    for (int i = 0; i < Pack<T>::lanes; ++i) index[i] = I(k * Pack<T>::lanes + i);
    pack.v[k] = (Vec<A>)((Index)pack.v[k] & (index >= broadcast<I>(I(first))));
  }
}

// The sum of the lanes, in double, from left to right.
template <class A>
FASTBN_HD double total(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < vector_bytes / int(sizeof(A)); ++i) sum += double(v[i]);
  return sum;
}
