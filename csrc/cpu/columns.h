// In: a block of a matrix whose columns belong to channels. Out: sums per column, and outputs.
// Columns are taken a pack at a time. The last pack of a row overlaps the one before it; what a block that
// is narrower than a pack has, goes through a buffer.

// How a pack is read and written: all of it, or its first n values.
template <class T>
struct WholePack {
  FASTBN_HD Pack<T> load(const T* p) const { return Pack<T>::load(p); }
  FASTBN_HD void store(const Pack<T>& pack, T* p) const { pack.store(p); }
};
template <class T>
struct StreamedPack : WholePack<T> {
  FASTBN_HD void store(const Pack<T>& pack, T* p) const { pack.stream(p); }
};
template <class T>
struct PartOfPack {
  int64_t n;
  FASTBN_HD Pack<T> load(const T* p) const { return Pack<T>::load_some(p, n); }
  FASTBN_HD void store(const Pack<T>& pack, T* p) const { pack.store_some(p, n); }
};

// Arrays in pack order.
template <class E, int Count>
struct PerColumn {
  const E* of[Count];
};

template <class T>
struct Columns {
  static constexpr int size = Pack<T>::size;

  int64_t start;   // element where the block begins
  int64_t stride;  // elements from one row to the next
  int64_t rows;
  int columns;  // at most max_columns

  bool narrow() const { return columns < size; }
  int whole() const { return columns / size * size; }
  int packs() const { return int(ceil_div(columns, size)); }
  // Where arrays hold a column: behind whole() they hold the overlapping pack.
  int slot(int column) const { return column < whole() || narrow() ? column : column + whole() + size - columns; }

  // From one value a channel to arrays in pack order. `a_channel` neighbouring columns share a channel; the
  // channels repeat after `channels` of them.
  template <class E>
  void expand(const E* values, int64_t channels, int64_t a_channel, E* out) const {
    if (a_channel == 1) {
      for (int64_t c = 0; c < columns; c += channels) {
        memcpy(out + c, values, smaller<int64_t>(channels, columns - c) * sizeof(E));
      }
    } else {
      for (int64_t c = 0, channel = 0; c < columns; c += a_channel, ++channel) {
        for (int64_t i = 0; i < a_channel; ++i) out[c + i] = values[channel];
      }
    }
    if (narrow()) {
      for (int c = columns; c < size; ++c) out[c] = 0;
    } else if (whole() < columns) {
      E last[size];
      memcpy(last, out + columns - size, sizeof(last));
      memcpy(out + whole(), last, sizeof(last));
    }
    reorder<T, true>(out, packs() * size);
  }

  // The reverse: adds what an array in pack order holds to one sum a channel, in a fixed order. Consumes the array.
  template <class E>
  void collect(E* in, int64_t channels, int64_t a_channel, double* sums) const {
    reorder<T, false>(in, packs() * size);
    const int64_t plain = narrow() ? columns : whole();
    if (a_channel == 1) {
      for (int64_t c = 0; c < columns; c += channels) {
        const int64_t here = smaller<int64_t>(channels, columns - c);
        const int64_t in_place = larger<int64_t>(0, smaller(here, plain - c));
        for (int64_t i = 0; i < in_place; ++i) sums[i] += double(in[c + i]);
        for (int64_t i = in_place; i < here; ++i) sums[i] += double(in[slot(int(c + i))]);
      }
      return;
    }
    constexpr int lanes = vector_bytes / int(sizeof(E));
    for (int64_t c = 0, channel = 0; c < columns; c += a_channel, ++channel) {
      const int64_t in_place = larger<int64_t>(0, smaller(a_channel, plain - c));
      Lanes<E, double> wide{};
      int64_t i = 0;
      for (; i + lanes <= in_place; i += lanes) {
        const auto values = lanes_of<double>(Pack<E>::load(in + c + i));
        for (int k = 0; k < values.vectors; ++k) wide.v[k] += values.v[k];
      }
      double sum = 0;
      for (const auto& v : wide.v) sum += total<double>(v);
      for (; i < in_place; ++i) sum += double(in[c + i]);
      for (; i < a_channel; ++i) sum += double(in[slot(int(c + i))]);
      sums[channel] += sum;
    }
  }

  // Adds to a and b, in pack order, the two terms that f(access, element, coefficients, a, b) makes of the packs
  // of rows [first, last).
  template <class E, class F>
  void accumulate(int64_t first, int64_t last, const E* coefficients, E* a, E* b, const F& f) const {
    if (narrow()) {
      each_pack_of_rows<1>(PartOfPack<T>{columns}, first, last, coefficients, a, b, f);
      return;
    }
    const int64_t fours = first + (last - first) / 4 * 4;
    each_pack_of_rows<4>(WholePack<T>{}, first, fours, coefficients, a, b, f);
    each_pack_of_rows<1>(WholePack<T>{}, fours, last, coefficients, a, b, f);
  }

  template <int Rows, class Access, class E, class F>
  void each_pack_of_rows(const Access access, int64_t first, int64_t last, const E* coefficients, E* a, E* b,
                         const F f) const {
    using L = Lanes<T, E>;
    const int64_t apart = stride;
    // By value: a store could change whatever is reached through a reference, and it would be read again.
    const auto step = [=](int64_t at, int p) FASTBN_INLINE {
      const L c = L::load(coefficients + p);
      L s = L::load(a + p), q = L::load(b + p);
      for (int r = 0; r < Rows; ++r) f(access, at + r * apart, c, s, q);
      s.store(a + p);
      q.store(b + p);
    };
    const int end = narrow() ? size : whole();
    const int overlap = narrow() || end == columns ? 0 : columns - size;
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * apart;
      for (int p = 0; p < end; p += size) step(base + p, p);
      if (overlap != 0) step(base + overlap, end);
    }
  }

  // out[i] = f(access, i, coefficients of its column); `streamed` asks for stores past the cache.
  template <int Count, class E, class F>
  void map(T* out, const PerColumn<E, Count> coefficients, bool streamed, const F& f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(out + start) % vector_bytes == 0 &&
                         stride * sizeof(T) % vector_bytes == 0 && columns % size == 0;
    const int64_t twos = rows / 2 * 2;
    if (narrow()) {
      map_rows<1>(PartOfPack<T>{columns}, 0, rows, out, coefficients, f);
    } else if (streamed && aligned) {
      // A row at a time: a cache line is then written in one go.
      map_rows<1>(StreamedPack<T>{}, 0, rows, out, coefficients, f);
    } else {
      map_rows<2>(WholePack<T>{}, 0, twos, out, coefficients, f);
      map_rows<1>(WholePack<T>{}, twos, rows, out, coefficients, f);
    }
  }

  template <int Rows, class Access, int Count, class E, class F>
  void map_rows(const Access access, int64_t first, int64_t last, T* out, const PerColumn<E, Count> coefficients,
                const F f) const {
    using L = Lanes<T, E>;
    const int64_t apart = stride;
    const auto step = [=](int64_t at, int p) FASTBN_INLINE {
      L c[Count];
      for (int k = 0; k < Count; ++k) c[k] = L::load(coefficients.of[k] + p);
      // All loads before the first store: rows often lie a multiple of 4 KiB apart, where a load behind a store
      // looks to the processor as if it read what was stored.
      Pack<T> results[Rows];
      for (int r = 0; r < Rows; ++r) results[r] = f(access, at + r * apart, c);
      for (int r = 0; r < Rows; ++r) access.store(results[r], out + at + r * apart);
    };
    const int end = narrow() ? size : whole();
    const int overlap = narrow() || end == columns ? 0 : columns - size;
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * apart;
      for (int p = 0; p < end; p += size) step(base + p, p);
      if (overlap != 0) step(base + overlap, end);
    }
  }
};
