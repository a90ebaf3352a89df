// SIMD vectors: loads, stores and conversions between storage types and the accumulation type. Included once per
// instruction set, inside its namespace; GCC vector extensions do the arithmetic.

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

// Streaming store: does not read the line that is overwritten. An ordinary store on 64-bit Arm, NOTES.md#arm. p is
// aligned to the vector.
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

// A word of two bfloat16 becomes the even and the odd value with one operation each, and back: the lanes of a pack of
// bfloat16 are the even elements, then the odd ones.
FASTBN_HD void widen(Vec<float> bits, BFloat16*, Vec<float> (&v)[2]) {
  v[0] = (Vec<float>)((Words)bits << 16);
  v[1] = (Vec<float>)((Words)bits & 0xffff0000u);
}
FASTBN_HD void widen(const BFloat16* p, Vec<float> (&v)[2]) { widen(load_bits<Vec<float>>(p), (BFloat16*)nullptr, v); }
// Rounds to nearest even, into the upper half of each word. No NaN overflows into another number: NaNs from arithmetic,
// from a bfloat16 input and from formula.h all have a zero lower half.
FASTBN_HD Words round_to_bfloat16(Vec<float> v) {
  const Words u = (Words)v;
#if FASTBN_VECTOR_BYTES == 64
  // Subtracts -0x7fff for an even last digit, -0x8000 for an odd one, which one ternary-logic operation selects.
  const __m512i odd = (__m512i)(u >> 16);
  return u - (Words)_mm512_ternarylogic_epi32(odd, _mm512_set1_epi32(1), _mm512_set1_epi32(-0x8000), 0xae);
#else
  return u + 0x7fffu + ((u >> 16) & 1u);
#endif
}
FASTBN_HD Vec<float> narrow(const Vec<float> (&v)[2], BFloat16*) {
  const Words even = round_to_bfloat16(v[0]) >> 16, odd = round_to_bfloat16(v[1]);
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_ternarylogic_epi32((__m512i)even, (__m512i)odd, _mm512_set1_epi32(-0x10000), 0xf8);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return (Vec<float>)(even | (odd & 0xffff0000u));
#endif
}

FASTBN_HD Vec<float> widen_lanes(const Half* p) {
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(load_bits<__m256i>(p));
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16(load_bits<float16x4_t>(p));
#else
  Vec<float> v;
  for (int i = 0; i < vector_bytes / 4; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

FASTBN_HD void widen(const Half* p, Vec<float> (&v)[2]) {
  for (int i = 0; i < 2; ++i) v[i] = widen_lanes(p + i * vector_bytes / 4);
}
FASTBN_HD void widen(Vec<float> bits, Half*, Vec<float> (&v)[2]) {
#if FASTBN_VECTOR_BYTES == 64
  v[0] = (Vec<float>)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)bits));
  v[1] = (Vec<float>)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)bits, 1));
#elif FASTBN_VECTOR_BYTES == 32
  v[0] = (Vec<float>)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)bits));
  v[1] = (Vec<float>)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)bits, 1));
#elif defined(__aarch64__)
  const float16x8_t halves = (float16x8_t)bits;
  v[0] = (Vec<float>)vcvt_f32_f16(vget_low_f16(halves));
  v[1] = (Vec<float>)vcvt_high_f32_f16(halves);
#else
  Half h[vector_bytes / 2];
  store_bits(h, bits);
  widen(h, v);
#endif
}
FASTBN_HD Vec<float> narrow(const Vec<float> (&v)[2], Half*) {
#if FASTBN_VECTOR_BYTES == 64
  const __m256i h[2] = {_mm512_cvtps_ph((__m512)v[0], _MM_FROUND_TO_NEAREST_INT),
                        _mm512_cvtps_ph((__m512)v[1], _MM_FROUND_TO_NEAREST_INT)};
  return (Vec<float>)_mm512_inserti64x4(_mm512_castsi256_si512(h[0]), h[1], 1);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_set_m128i(_mm256_cvtps_ph((__m256)v[1], _MM_FROUND_TO_NEAREST_INT),
                                      _mm256_cvtps_ph((__m256)v[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)v[0]), (float32x4_t)v[1]);
#else
  constexpr int lanes = vector_bytes / 4;
  Half h[2 * lanes];
  for (int i = 0; i < lanes; ++i) h[i] = from_acc<Half>(v[0][i]), h[lanes + i] = from_acc<Half>(v[1][i]);
  return load_bits<Vec<float>>(h);
#endif
}

// One vector register of memory: `size` values of T, widened to one vector of float or double, or two of float.
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
      widen(p, r.v);
    }
    return r;
  }
  // From and to a register in storage format.
  static FASTBN_HD Pack of(Vec<float> bits) {
    Pack r;
    if constexpr (vectors == 1) {
      r.v[0] = (Vec<A>)bits;
    } else {
      widen(bits, (T*)nullptr, r.v);
    }
    return r;
  }
  FASTBN_HD Vec<float> bits() const {
    if constexpr (vectors == 1) {
      return (Vec<float>)v[0];
    } else {
      return narrow(v, (T*)nullptr);
    }
  }
  FASTBN_HD void store(T* p) const { store_bits(p, bits()); }
  FASTBN_HD void stream(T* p) const { stream_bits(p, bits()); }
};

// The values of a Pack<T> converted to E.
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
  static FASTBN_HD Lanes all(E x) {
    Lanes r;
    for (auto& e : r.v) e = broadcast<E>(x);
    return r;
  }
  FASTBN_HD void store(E* p) const {
    for (int i = 0; i < vectors; ++i) store_bits(p + i * lanes, v[i]);
  }
};

// The type of the sums over a channel. Gradients of parameters and means near zero nearly cancel, so rounding errors of
// the terms stay visible: float64, in which products of floats are exact. For bfloat16 float32 is enough: a product of
// two is exact, and so, nearly always, is a sum of float_terms of them.
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, BFloat16>, float, double>;
constexpr int float_terms = 32;
// Whether the type of the sums is wider than that of the values.
template <class T>
constexpr bool wide_sums = sizeof(sum_t<T>) > sizeof(acc_t<T>);
// Whether sums of products are so nearly exact that the first pass needs no pivot; NOTES.md#bfloat16.
template <class T>
constexpr bool starts_at_zero = !std::is_same_v<T, double>;
// The square of the allowed distance of a pivot from the mean, in standard deviations.
template <class T>
constexpr double pivot_allowed = wide_sums<T>        ? 1e6
                                 : starts_at_zero<T> ? 16
                                                     : 4;

// A value near the mean to subtract from x; a value of T where sums are float32, so that differences are exact. Always
// finite, or it would spoil the sums.
template <class T>
FASTBN_HD sum_t<T> pivot_near(double mean) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // No branches, so that loops over channels vectorize.
    const uint32_t bits = detail::float_bits(float(mean)), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 << 16;
    constexpr uint32_t infinite = 0x7f800000u;
    return detail::bits_float((bits & infinite) == infinite || (rounded & infinite) == infinite ? 0u : rounded);
  } else {
    return __builtin_isfinite(mean) ? mean : 0;
  }
}

// The pivot for products with x - pivot: 0 where possible. A rounded mean near zero has smaller digits than bfloat16,
// which would make the products inexact.
template <class T>
FASTBN_HD sum_t<T> gradient_pivot(double mean, double variance) {
  constexpr double allowed = wide_sums<T> ? pivot_allowed<T> : std::is_same_v<T, BFloat16> ? 1 : 0;
  return mean * mean < allowed * variance ? 0 : pivot_near<T>(mean);
}

// The values of a pack as E.
template <class E, class T>
FASTBN_HD Lanes<T, E> lanes_of(const Pack<T>& pack) {
  Lanes<T, E> r;
  if constexpr (sizeof(acc_t<T>) == sizeof(E)) {
    for (int k = 0; k < Pack<T>::vectors; ++k) r.v[k] = pack.v[k];
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

// Vectors of double from memory, which is cheaper than from a register: no half has to be moved.
FASTBN_HD Vec<double> in_double(const float* p) {
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_cvtps_pd(load_bits<__m256>(p));
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_cvtps_pd(load_bits<__m128>(p));
#else
  Vec<double> v;
  for (int i = 0; i < vector_bytes / 8; ++i) v[i] = double(p[i]);
  return v;
#endif
}
FASTBN_HD Vec<double> in_double(const Half* p) {
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_cvtps_pd(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadu_si64(p)));
#elif defined(__aarch64__)
  const float16x4_t pair = vreinterpret_f16_u32(vdup_n_u32(load_bits<uint32_t>(p)));
  return (Vec<double>)vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(pair)));
#else
  Vec<double> v;
  for (int i = 0; i < vector_bytes / 8; ++i) v[i] = double(to_acc(p[i]));
  return v;
#endif
}

// The values of a pack in memory as E.
template <class E, class T>
FASTBN_HD Lanes<T, E> lanes_at(const T* p) {
  if constexpr (sizeof(acc_t<T>) == sizeof(E)) {
    return lanes_of<E>(Pack<T>::load(p));
  } else {
    Lanes<T, E> r;
    for (int i = 0; i < r.vectors; ++i) r.v[i] = in_double(p + i * r.lanes);
    return r;
  }
}

// Lane i is value from[i] of a followed by b.
template <class V>
FASTBN_HD V shuffle(V a, V b, const int (&from)[sizeof(V) / 4]) {
#if defined(__clang__)
  V r;
  constexpr int lanes = sizeof(V) / 4;
  for (int i = 0; i < lanes; ++i) r[i] = from[i] < lanes ? a[from[i]] : b[from[i] - lanes];
  return r;
#else
  VectorOf<int32_t>::type mask;
  for (int i = 0; i < int(sizeof(V) / 4); ++i) mask[i] = from[i];
  return __builtin_shuffle(a, b, mask);
#endif
}

// Permutes arrays of one float per element between memory order and lane order; in place, whole packs.
template <class T, bool ToLanes, class E>
void reorder(E* array, int count) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int lanes = Pack<T>::lanes;
    int first[lanes], second[lanes];
    for (int i = 0; i < lanes; ++i) {
      first[i] = ToLanes ? 2 * i : i / 2 + i % 2 * lanes;
      second[i] = ToLanes ? 2 * i + 1 : lanes / 2 + first[i];
    }
    for (int p = 0; p < count; p += Pack<T>::size) {
      const Vec<float> a = load_bits<Vec<float>>(array + p), b = load_bits<Vec<float>>(array + p + lanes);
      store_bits(array + p, shuffle(a, b, first));
      store_bits(array + p + lanes, shuffle(a, b, second));
    }
  }
}

// The index of each lane's element in its pack.
template <class T, class E>
FASTBN_HD auto elements(int k) {
  using I = std::conditional_t<sizeof(E) == 8, int64_t, int32_t>;
  typename VectorOf<I>::type index;
  for (int i = 0; i < Lanes<T, E>::lanes; ++i) {
    index[i] = I(std::is_same_v<T, BFloat16> ? 2 * i + k : k * Lanes<T, E>::lanes + i);
  }
  return index;
}

// Replaces element `first` and those behind it.
template <class T, class E>
FASTBN_HD void replace_from(Lanes<T, E>& values, int first, const Lanes<T, E>& others = {}) {
  for (int k = 0; k < Lanes<T, E>::vectors; ++k) {
    values.v[k] = elements<T, E>(k) < first ? values.v[k] : others.v[k];
  }
}

// Sets the elements before `first` to zero.
template <class T, class E>
FASTBN_HD void keep_from(Lanes<T, E>& values, int first) {
  Lanes<T, E> zero{};
  replace_from<T, E>(zero, first, values);
  values = zero;
}

// The values of a vector in float64; the halves of a vector of floats are added.
FASTBN_HD Vec<double> widen_add(Vec<double> v) { return v; }
FASTBN_HD Vec<double> widen_add(Vec<float> v) {
  const auto halves = lanes_of<double>(Pack<float>{{v}});
  return halves.v[0] + halves.v[1];
}

// The sum of many vectors. Floats are summed in two parts of 12 digits, whose sums are nearly always exact: converting
// each vector to float64 costs a quarter of the whole reduction (NOTES.md#small-maps).
template <class E>
struct LongSum {
  Vec<double> sum{};
  FASTBN_HD void add(Vec<E> v) { sum += v; }
  FASTBN_HD Vec<double> get() { return sum; }
};
template <>
struct LongSum<float> {
  Vec<double> sum{};
  Vec<float> high{}, low{};
  int terms = 0;
  FASTBN_HD void add(Vec<float> v) {
    const Vec<float> upper = (Vec<float>)((Words)v & 0xfffff000u);
    high += upper;
    low += v - upper;
    if (++terms == float_terms) get();
  }
  FASTBN_HD Vec<double> get() {
    low = high - high == 0 ? low : Vec<float>{};  // infinity - infinity
    sum += widen_add(high) + widen_add(low);
    high = low = Vec<float>{}, terms = 0;
    return sum;
  }
};

// The sum of the lanes in float64, from left to right.
template <class A>
FASTBN_HD double total(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < vector_bytes / int(sizeof(A)); ++i) sum += double(v[i]);
  return sum;
}

// Loads and stores of a whole pack, or of its first n values with zeros for the others. `bits`: in storage format.
// `store_second`: for a second output.
template <class T>
struct WholePack {
  // Whether to use streaming stores; results are then aligned. Chosen at run time: as template arguments the loops take
  // 50 % longer to compile and are no faster (NOTES.md#compile-time).
  bool streams = false, both_stream = false;

  FASTBN_HD Pack<T> load(const T* p) const { return Pack<T>::load(p); }
  template <class E>
  FASTBN_HD Lanes<T, E> load_as(const T* p) const {
    return lanes_at<E>(p);
  }
  FASTBN_HD Vec<float> bits(const T* p) const { return load_bits<Vec<float>>(p); }
  FASTBN_HD void store(const Pack<T>& pack, T* p) const { write(pack.bits(), p, streams); }
  template <int Rows>
  FASTBN_HD void store_rows(const Pack<T> (&packs)[Rows], T* p, int64_t apart) const {
    if (streams) {
      for (int r = 0; r < Rows; ++r) packs[r].stream(p + r * apart);
    } else {
      for (int r = 0; r < Rows; ++r) packs[r].store(p + r * apart);
    }
  }
  FASTBN_HD void store_second(Vec<float> bits, T* p) const { write(bits, p, both_stream); }
  static FASTBN_HD void write(Vec<float> bits, T* p, bool past) { past ? stream_bits(p, bits) : store_bits(p, bits); }
};
template <class T>
struct PartOfPack {
  static constexpr bool streams = false;
  int64_t n;
  FASTBN_HD Pack<T> load(const T* p) const { return Pack<T>::of(bits(p)); }
  template <class E>
  FASTBN_HD Lanes<T, E> load_as(const T* p) const {
    return lanes_of<E>(load(p));
  }
  FASTBN_HD Vec<float> bits(const T* p) const {
    T buffer[Pack<T>::size] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load_bits<Vec<float>>(buffer);
  }
  FASTBN_HD void store(const Pack<T>& pack, T* p) const { store_second(pack.bits(), p); }
  template <int Rows>
  FASTBN_HD void store_rows(const Pack<T> (&packs)[Rows], T* p, int64_t apart) const {
    for (int r = 0; r < Rows; ++r) store(packs[r], p + r * apart);
  }
  FASTBN_HD void store_second(Vec<float> bits, T* p) const { memcpy(p, &bits, n * sizeof(T)); }
};

// Prefetches into L2: L1 has few line-fill buffers, and channels_last tensors that exceed the caches take up to 50 %
// longer with it (NOTES.md#prefetch).
template <class T>
FASTBN_HD void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
// The prefetch distance. Memory latency is 100 ns or more, in which a thread reads 3 KB; 4 to 16 KB are equally fast
// (NOTES.md#prefetch).
constexpr int64_t bytes_ahead = 8 << 10;
