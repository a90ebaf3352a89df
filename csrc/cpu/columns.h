// In: a block of a matrix whose columns belong to channels. Out: sums per column, and outputs.
// Columns are taken a pack at a time. The last pack of a row overlaps the one before it; what a block that
// is narrower than a pack has, goes through a buffer.

template <class T>
struct Columns {
  using A = acc_t<T>;
  using P = Pack<T>;
  using K = Coefficients<T>;
  static constexpr int V = P::vectors;

  int64_t start;   // element where the block begins
  int64_t stride;  // elements from one row to the next
  int64_t rows;
  int columns;  // at most max_columns

  FASTBN_HD int packs() const { return int(ceil_div(columns, P::size)); }
  FASTBN_HD bool narrow() const { return columns < P::size; }
  FASTBN_HD int whole() const { return columns / P::size * P::size; }
  FASTBN_HD int column_of_pack(int p) const {
    return narrow() ? 0 : smaller(p * P::size, columns - P::size);
  }
  // Where arrays in pack order hold a column: behind whole() they hold the overlapping pack.
  FASTBN_HD int slot(int column) const {
    return column < whole() || narrow() ? column : column + whole() + P::size - columns;
  }

  FASTBN_HD P load(const T* p) const { return narrow() ? P::load_some(p, columns) : P::load(p); }

  // From one value a channel to arrays in pack order. `a_channel` neighbouring columns share a channel; the
  // channels repeat after `channels` of them.
  void expand(const A* values, int64_t channels, int64_t a_channel, A* out) const {
    if (a_channel == 1) {
      for (int64_t c = 0; c < columns; c += channels) {
        memcpy(out + c, values, smaller<int64_t>(channels, columns - c) * sizeof(A));
      }
    } else {
      for (int64_t c = 0, channel = 0; c < columns; c += a_channel, ++channel) {
        for (int64_t i = 0; i < a_channel; ++i) out[c + i] = values[channel];
      }
    }
    if (!narrow() && whole() < columns) {
      A last[P::size];
      memcpy(last, out + columns - P::size, sizeof(last));
      memcpy(out + whole(), last, sizeof(last));
    } else if (narrow()) {
      for (int c = columns; c < P::size; ++c) out[c] = 0;
    }
  }

  // The reverse: adds what arrays in pack order hold to one sum a channel, always from left to right.
  void collect(const A* in, int64_t channels, int64_t a_channel, double* sums) const {
    if (a_channel == 1) {
      for (int64_t c = 0; c < columns; c += channels) {
        const int64_t here = smaller<int64_t>(channels, columns - c);
        const int64_t plain = narrow() ? here : larger<int64_t>(0, smaller(here, whole() - c));
        for (int64_t i = 0; i < plain; ++i) sums[i] += double(in[c + i]);
        for (int64_t i = plain; i < here; ++i) sums[i] += double(in[slot(int(c + i))]);
      }
      return;
    }
    constexpr int lanes = P::lanes;
    for (int64_t c = 0, channel = 0; c < columns; c += a_channel, ++channel) {
      DoubleSum<A> sum;
      int64_t i = 0;
      const int64_t plain = narrow() ? a_channel : smaller(a_channel, whole() - c);
      for (; i + lanes <= plain; i += lanes) sum.add(load_bits<Vec<A>>(in + c + i));
      double rest = 0;
      for (; i < a_channel; ++i) rest += double(in[slot(int(c + i))]);
      sums[channel] += sum.total() + rest;
    }
  }

  // Adds to a and b, in pack order, the two terms that f makes of each element of rows [first, last).
  template <class F>
  void accumulate(int64_t first, int64_t last, const A* coefficient, A* a, A* b, const F& f) const {
    if (narrow()) return accumulate_rows<1, true>(first, last, coefficient, a, b, f);
    const int64_t fours = first + (last - first) / 4 * 4;
    accumulate_rows<4, false>(first, fours, coefficient, a, b, f);
    accumulate_rows<1, false>(fours, last, coefficient, a, b, f);
  }

  template <int Rows, bool Narrow, class F>
  void accumulate_rows(int64_t first, int64_t last, const A* coefficient, A* a, A* b, const F& f) const {
    const int count = packs();
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * stride;
      for (int p = 0; p < count; ++p) {
        const int64_t at = base + column_of_pack(p);
        const K c = K::load(coefficient + p * P::size);
        K s = K::load(a + p * P::size), q = K::load(b + p * P::size);
        for (int r = 0; r < Rows; ++r) f(*this, at + r * stride, c, s, q);
        s.store(a + p * P::size);
        q.store(b + p * P::size);
      }
    }
  }

  // out[i] = f(element i, coefficients of its column), rows [0, rows); `streamed` asks for stores past the cache.
  template <int Count, class F>
  void map(T* out, const A* const (&coefficients)[Count], bool streamed, const F& f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(out + start) % vector_bytes == 0 &&
                         stride * sizeof(T) % vector_bytes == 0 && columns % P::size == 0;
    if (narrow()) {
      map_rows<1, 1, Count>(0, rows, out, coefficients, f);
    } else {
      const int64_t twos = rows / 2 * 2;
      if (streamed && aligned) {
        map_rows<2, 2, Count>(0, twos, out, coefficients, f);
      } else {
        map_rows<2, 0, Count>(0, twos, out, coefficients, f);
      }
      map_rows<1, 0, Count>(twos, rows, out, coefficients, f);
    }
  }

  template <int Rows, int Store, int Count, class F>
  void map_rows(int64_t first, int64_t last, T* out, const A* const (&coefficients)[Count], const F& f) const {
    const int count = packs();
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * stride;
      for (int p = 0; p < count; ++p) {
        const int64_t at = base + column_of_pack(p);
        K c[Count];
        for (int k = 0; k < Count; ++k) c[k] = K::load(coefficients[k] + p * P::size);
        for (int r = 0; r < Rows; ++r) {
          const int64_t i = at + r * stride;
          const P result = f(*this, i, c);
          if constexpr (Store == 2) {
            result.stream(out + i);
          } else if constexpr (Store == 1) {
            result.store_some(out + i, columns);
          } else {
            result.store(out + i);
          }
        }
      }
    }
  }
};
