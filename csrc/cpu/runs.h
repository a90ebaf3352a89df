// In: runs of contiguous values of one channel (channels_first, wide maps). Out: sums, and outputs.
// Every run has at least Pack<T>::size values, so its end is an overlapping pack instead of a scalar loop.

template <class T>
struct Runs {
  using A = acc_t<T>;
  using P = Pack<T>;
  static constexpr int V = P::vectors;
  // Packs in flight: enough accumulators to hide the latency of an addition, few enough to stay in registers.
  static constexpr int unroll = 4 / V;
  // Terms that a lane adds in A before its sum goes to double.
  static constexpr int terms = 32;

  // Sums of f(pack at i): two vectors of terms each, over many runs.
  template <class F>
  struct Sums {
    F f;
    Vec<A> a[4] = {}, b[4] = {};
    DoubleSum<A> sum_a, sum_b;
    int filled = 0;

    explicit Sums(const F& terms_of) : f(terms_of) {}
    FASTBN_HD void flush() {
      sum_a.add((a[0] + a[1]) + (a[2] + a[3]));
      sum_b.add((b[0] + b[1]) + (b[2] + b[3]));
      for (int k = 0; k < 4; ++k) a[k] = b[k] = Vec<A>{};
      filled = 0;
    }
    FASTBN_HD void run(int64_t offset, int64_t length) {
      int64_t i = 0;
      const int64_t whole = length - P::size * unroll;
      while (i <= whole) {
        const int64_t stop = smaller(whole, i + (terms - 1 - filled) * int64_t(P::size * unroll));
        Vec<A> s[4] = {a[0], a[1], a[2], a[3]}, q[4] = {b[0], b[1], b[2], b[3]};
        const int64_t start = i;
        for (; i <= stop; i += P::size * unroll) {
          for (int u = 0; u < unroll; ++u) f(offset + i + u * P::size, 0, s + u * V, q + u * V);
        }
        for (int k = 0; k < 4; ++k) a[k] = s[k], b[k] = q[k];
        filled += int((i - start) / (P::size * unroll));
        if (filled >= terms) flush();
      }
      int u = 0;
      for (; i + P::size <= length; i += P::size, ++u) f(offset + i, 0, a + u * V, b + u * V);
      if (i < length) {
        f(offset + length - P::size, P::size - (length - i), a + 4 - V, b + 4 - V);
      }
      if (++filled >= terms) flush();
    }
  };

  // Adds x - pivot and (x - pivot)^2; lanes before `first` were counted already.
  struct Shifted {
    const T* x;
    Vec<A> pivot;
    FASTBN_HD void operator()(int64_t i, int64_t first, Vec<A>* s, Vec<A>* q) const {
      P d = P::load(x + i);
      for (int k = 0; k < V; ++k) d.v[k] -= pivot;
      if (first != 0) keep_from(d, first);
      for (int k = 0; k < V; ++k) {
        s[k] += d.v[k];
        q[k] += d.v[k] * d.v[k];
      }
    }
  };

  // Adds dy and dy * (x - mean).
  struct Gradients {
    const T* dy;
    const T* x;
    Vec<A> mean;
    FASTBN_HD void operator()(int64_t i, int64_t first, Vec<A>* s, Vec<A>* q) const {
      P g = P::load(dy + i);
      P d = P::load(x + i);
      for (int k = 0; k < V; ++k) d.v[k] -= mean;
      if (first != 0) keep_from(g, first), keep_from(d, first);
      for (int k = 0; k < V; ++k) {
        s[k] += g.v[k];
        q[k] += g.v[k] * d.v[k];
      }
    }
  };

  // y[i] = f(pack at i), each value written once but for the overlap at the end.
  template <bool Stream, class F>
  static FASTBN_HD void map(T* y, int64_t offset, int64_t length, const F& f) {
    T* const out = y + offset;
    int64_t i = 0;
    if constexpr (Stream) {
      const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(out) % 64);
      if (misaligned != 0) {
        const int64_t head = (64 - misaligned) / int64_t(sizeof(T));
        for (; i < head && i + P::size <= length; i += P::size) f(offset + i).store(out + i);
        i = smaller(head, i);
      }
      for (; i + P::size <= length; i += P::size) f(offset + i).stream(out + i);
    } else {
      for (; i + 2 * P::size <= length; i += 2 * P::size) {
        f(offset + i).store(out + i);
        f(offset + i + P::size).store(out + i + P::size);
      }
      for (; i + P::size <= length; i += P::size) f(offset + i).store(out + i);
    }
    if (i < length) f(offset + length - P::size).store(out + length - P::size);
  }
};
