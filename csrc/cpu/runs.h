// In: runs of contiguous values of one channel (channels_first, wide maps). Out: sums, and outputs.
// Every run has at least Pack<T>::size values, so its end is an overlapping pack instead of a scalar loop.

// Calls f(i, first, u) for packs at i that cover [from, to): u counts 0 to Unroll - 1 for accumulators that do not
// wait for each other. Values of the last pack before its `first` were covered already.
template <class T, int Unroll, class F>
FASTBN_HD void each_pack(int64_t from, int64_t to, const F& f) {
  constexpr int size = Pack<T>::size;
  int64_t i = from;
  for (; i + size * Unroll <= to; i += size * Unroll) {
    for (int u = 0; u < Unroll; ++u) f(i + u * size, 0, u);
  }
  for (; i + size <= to; i += size) f(i, 0, 0);
  if (i < to) f(to - size, size - (to - i), Unroll - 1);
}

// Sums of x - pivot and its square over many runs, in the accumulation type, and every so often in double.
template <class T>
struct ShiftedSums {
  using A = acc_t<T>;
  static constexpr int V = Pack<T>::vectors;
  static constexpr int unroll = 4 / V;
  // Values that a lane adds in A before its sum goes to double: their rounding stays below that of the result.
  static constexpr int terms = 32;
  static constexpr int64_t stretch = int64_t(terms) * unroll * Pack<T>::size;

  const T* x;
  Vec<A> pivot;
  Vec<A> s[4] = {}, q[4] = {};
  double sum = 0, squares = 0;
  int64_t pending = 0;

  ShiftedSums(const T* data, A guess) : x(data), pivot(broadcast(guess)) {}

  void run(int64_t offset, int64_t length) {
    for (int64_t from = 0; from < length; from += stretch) {
      const int64_t to = smaller(length, from + stretch);
      if (pending + (to - from) > stretch) flush();
      Vec<A> a[4] = {s[0], s[1], s[2], s[3]}, b[4] = {q[0], q[1], q[2], q[3]};
      const T* const data = x + offset;
      const Vec<A> p = pivot;
      each_pack<T, unroll>(from, to, [&](int64_t i, int64_t first, int u) FASTBN_INLINE {
        Pack<T> d = Pack<T>::load(data + i);
        for (int k = 0; k < V; ++k) d.v[k] -= p;
        if (first != 0) keep_from(d, first);
        for (int k = 0; k < V; ++k) {
          a[u * V + k] += d.v[k];
          b[u * V + k] += d.v[k] * d.v[k];
        }
      });
      for (int k = 0; k < 4; ++k) s[k] = a[k], q[k] = b[k];
      pending += to - from;
    }
  }

  void flush() {
    sum += total<A>((s[0] + s[1]) + (s[2] + s[3]));
    squares += total<A>((q[0] + q[1]) + (q[2] + q[3]));
    for (int k = 0; k < 4; ++k) s[k] = q[k] = Vec<A>{};
    pending = 0;
  }
};

// Sums of dy and of dy * (x - pivot) over many runs, as gradient_t says.
template <class T>
struct GradientSums {
  using E = gradient_t<T>;
  using L = Lanes<T, E>;
  static constexpr int unroll = L::vectors >= 4 ? 1 : 2;
  static constexpr int64_t stretch = int64_t(gradient_terms) * unroll * Pack<T>::size;

  const T* dy;
  const T* x;
  Vec<E> pivot;
  L s[unroll] = {}, q[unroll] = {};
  double sum = 0, dot = 0;
  int64_t pending = 0;

  GradientSums(const T* gradient, const T* data, E around) : dy(gradient), x(data), pivot(broadcast(around)) {}

  void run(int64_t offset, int64_t length) {
    for (int64_t from = 0; from < length; from += stretch) {
      const int64_t to = smaller(length, from + stretch);
      if (pending + (to - from) > stretch) flush();
      L a[unroll], b[unroll];
      for (int u = 0; u < unroll; ++u) a[u] = s[u], b[u] = q[u];
      const T* const gradient = dy + offset;
      const T* const data = x + offset;
      const Vec<E> p = pivot;
      each_pack<T, unroll>(from, to, [&](int64_t i, int64_t first, int u) FASTBN_INLINE {
        Pack<T> pack = Pack<T>::load(gradient + i);
        if (first != 0) keep_from(pack, first);
        const L g = lanes_of<E>(pack), d = lanes_of<E>(Pack<T>::load(data + i));
        for (int k = 0; k < L::vectors; ++k) {
          a[u].v[k] += g.v[k];
          b[u].v[k] += g.v[k] * (d.v[k] - p);
        }
      });
      for (int u = 0; u < unroll; ++u) s[u] = a[u], q[u] = b[u];
      pending += to - from;
    }
  }

  void flush() {
    for (int u = 0; u < unroll; ++u) {
      for (int k = 0; k < L::vectors; ++k) {
        sum += total<E>(s[u].v[k]);
        dot += total<E>(q[u].v[k]);
      }
      s[u] = q[u] = {};
    }
    pending = 0;
  }
};

// out[i] = f(pack at i) over a run, each value written once but for the overlap at the end. With Stream, whole
// cache lines go past the cache.
template <bool Stream, class T, class F>
FASTBN_HD void map_run(T* out, int64_t length, const F& f) {
  constexpr int size = Pack<T>::size;
  constexpr int unroll = 4;
  int64_t i = 0;
  if constexpr (Stream) {
    constexpr int64_t line = 64;
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(out) % line);
    if (misaligned != 0) {
      const int64_t head = smaller((line - misaligned) / int64_t(sizeof(T)), length / size * size);
      for (; i < head; i += size) f(i).store(out + i);
      i = head;
    }
    for (; i + size * unroll <= length; i += size * unroll) {
      for (int u = 0; u < unroll; ++u) f(i + u * size).stream(out + i + u * size);
    }
  } else {
    for (; i + size * unroll <= length; i += size * unroll) {
      for (int u = 0; u < unroll; ++u) f(i + u * size).store(out + i + u * size);
    }
  }
  for (; i + size <= length; i += size) f(i).store(out + i);
  if (i < length) f(length - size).store(out + length - size);
}
