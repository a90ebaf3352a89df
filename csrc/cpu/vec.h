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
typedef uint16_t HalfWords __attribute__((vector_size(FASTBN_VECTOR_BYTES / 2)));

FASTBN_HD Vec<float> widen(HalfWords h, BFloat16*) {
  return (Vec<float>)(__builtin_convertvector(h, Words) << 16);
}
FASTBN_HD HalfWords narrow(Vec<float> v, BFloat16*) {
  const Words u = (Words)v;
  const Words rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Words quiet = u | 0x400000u;
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, HalfWords);
}
FASTBN_HD Vec<float> widen(HalfWords h, Half*) {
#if FASTBN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif FASTBN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> v;
  for (int i = 0; i < vector_bytes / 4; ++i) v[i] = to_acc(Half{h[i]});
  return v;
#endif
}
FASTBN_HD HalfWords narrow(Vec<float> v, Half*) {
#if FASTBN_VECTOR_BYTES == 64
  return (HalfWords)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FASTBN_VECTOR_BYTES == 32
  return (HalfWords)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfWords h;
  for (int i = 0; i < vector_bytes / 4; ++i) h[i] = from_acc<Half>(v[i]).bits;
  return h;
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
      for (int i = 0; i < 2; ++i) r.v[i] = widen(load_bits<HalfWords>(p + i * lanes), (T*)nullptr);
    }
    return r;
  }
  FASTBN_HD void store(T* p) const {
    if constexpr (vectors == 1) {
      store_bits(p, v[0]);
    } else {
      for (int i = 0; i < 2; ++i) store_bits(p + i * lanes, narrow(v[i], (T*)nullptr));
    }
  }
  FASTBN_HD void stream(T* p) const {
    if constexpr (vectors == 1) {
      stream_bits(p, (Vec<float>)v[0]);
    } else {
      HalfWords h[2] = {narrow(v[0], (T*)nullptr), narrow(v[1], (T*)nullptr)};
      stream_bits(p, load_bits<Vec<float>>(h));
    }
  }
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

// As many accumulation values as a Pack<T> holds values.
template <class T>
struct Coefficients {
  using A = acc_t<T>;
  Vec<A> v[Pack<T>::vectors];
  static FASTBN_HD Coefficients load(const A* p) {
    Coefficients r;
    for (int i = 0; i < Pack<T>::vectors; ++i) r.v[i] = load_bits<Vec<A>>(p + i * Pack<T>::lanes);
    return r;
  }
  FASTBN_HD void store(A* p) const {
    for (int i = 0; i < Pack<T>::vectors; ++i) store_bits(p + i * Pack<T>::lanes, v[i]);
  }
};

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

// Sums in the accumulation type, taken over in double before they have grown many times their terms.
template <class A>
struct DoubleSum {
  static constexpr int lanes = vector_bytes / sizeof(A);
  Vec<double> part[sizeof(double) / sizeof(A)] = {};
  FASTBN_HD void add(Vec<A> v) {
    if constexpr (sizeof(A) == 8) {
      part[0] += v;
    } else {
      typedef float HalfVec __attribute__((vector_size(FASTBN_VECTOR_BYTES / 2)));
      HalfVec h[2];
      __builtin_memcpy(h, &v, sizeof(v));
      for (int i = 0; i < 2; ++i) part[i] += __builtin_convertvector(h[i], Vec<double>);
    }
  }
  FASTBN_HD double total() const {
    Vec<double> v = part[0];
    if constexpr (sizeof(A) == 4) v += part[1];
    double sum = 0;
    for (int i = 0; i < vector_bytes / 8; ++i) sum += v[i];
    return sum;
  }
};
