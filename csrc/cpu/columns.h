// In: a block of a matrix whose columns belong to channels. Out: sums per column, and outputs.
// Columns are taken a pack at a time. The last pack of a row overlaps the one before it; what a block that
// is narrower than a pack has, goes through a buffer.

// How a pass that writes outputs meets memory.
struct MemoryUse {
  bool streamed;  // outputs are stored past the cache
  bool both;      // then the residual's gradient, too
  bool unread;    // nobody has just read the inputs: what comes next is to be asked for
  // Elements from an input to its like in the item that is summed next: that one is fetched while this one is written,
  // when the way from memory is free. 0.75 to 0.95 of the time, forward and backward, from 6 MB on; smaller tensors 0.8
  // to 1 where the cache holds other data before, else 1 to 1.05. 0: there is none.
  int64_t next;
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
  int columns;   // at most max_columns
  int64_t slot;  // of the mask, of the first pack
  int64_t slots_a_row;

  bool narrow() const { return columns < size; }
  // Rows are fetched while those before them are read: to the processor's prefetcher several rows in turns are as many
  // streams that each end soon. Near ones `rows_ahead` (channels_last past the cache 0.67 to 0.93 of the time, in both
  // passes), others the next ones (sums of small maps 0.8 to 0.95 where the cache holds other data before, else 1).
  bool is_near() const { return stride * int64_t(sizeof(T)) <= 16 << 10; }
  // As many elements as `bytes_ahead`, but whole steps of Rows rows, or what is fetched is not what is read.
  template <int Rows>
  int64_t rows_ahead() const {
    const int64_t step = Rows * stride;  // 0 of spare elements, a row of their own
    return ceil_div(bytes_ahead / int64_t(sizeof(T)), larger<int64_t>(1, step)) * step;
  }
  int whole() const { return columns / size * size; }
  int packs() const { return int(ceil_div(columns, size)); }
  // Where arrays hold a column: behind whole() they hold the overlapping pack.
  int place(int column) const { return column < whole() || narrow() ? column : column + whole() + size - columns; }

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
        for (int64_t i = in_place; i < here; ++i) sums[i] += double(in[place(int(c + i))]);
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
      for (; i < a_channel; ++i) sum += double(in[place(int(c + i))]);
      sums[channel] += sum;
    }
  }

  // step(access, element, array index, slot) for the packs of rows [first, last), Rows of them at a time: the element
  // and the slot are those of the first row.
  template <int Rows, class Access, class Step>
  FASTBN_HD void each_pack_of_rows(const Access& access, int64_t first, int64_t last, const Step& step) const {
    const int end = narrow() ? size : whole();
    const int overlap = narrow() || end == columns ? 0 : columns - size;
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * stride, slots = slot + row * slots_a_row;
      for (int p = 0; p < end; p += size) step(access, base + p, p, slots + p / size);
      if (overlap != 0) step(access, base + overlap, end, slots + end / size);
    }
  }

  // Adds to s and q, in pack order, the terms a and a * b that f makes of the packs of rows [first, last).
  template <class F>
  void accumulate(int64_t first, int64_t last, const sum_t<T>* pivot, const PerColumn<acc_t<T>, 3> for_z, sum_t<T>* s,
                  sum_t<T>* q, const F& f) const {
    if (narrow()) {
      add_rows<1>(PartOfPack<T>{columns}, first, last, pivot, for_z, s, q, f);
      return;
    }
    const int64_t fours = first + (last - first) / 4 * 4;
    add_rows<4>(WholePack<T>{}, first, fours, pivot, for_z, s, q, f);
    add_rows<1>(WholePack<T>{}, fours, last, pivot, for_z, s, q, f);
  }

  template <int Rows, class Access, class F>
  void add_rows(const Access access, int64_t first, int64_t last, const sum_t<T>* pivot,
                const PerColumn<acc_t<T>, 3> for_z, sum_t<T>* s, sum_t<T>* q, const F f) const {
    using S = Lanes<T, sum_t<T>>;
    using L = Lanes<T, acc_t<T>>;
    // By value: a store could change whatever is reached through a reference, and it would be read again.
    const int64_t apart = stride, slots_apart = slots_a_row;
    const bool near = is_near();
    const int64_t ahead = rows_ahead<Rows>();
    each_pack_of_rows<Rows>(access, first, last, [=](const Access& a, int64_t at, int p, int64_t slots) FASTBN_INLINE {
      S c{};
      if constexpr (F::shifted) c = S::load(pivot + p);
      ForZ<T> z{};
      if constexpr (F::needs_z) z = {L::load(for_z.of[0] + p), L::load(for_z.of[1] + p), L::load(for_z.of[2] + p)};
      S sum = S::load(s + p), dot = S::load(q + p);
      for (int r = 0; r < Rows; ++r) {
        f.prefetch(at + r * apart + (near ? ahead : Rows * apart));
        S x, y;
        f(a, at + r * apart, slots + r * slots_apart, c, z, x, y);
        for (int k = 0; k < S::vectors; ++k) sum.v[k] += x.v[k], dot.v[k] += x.v[k] * y.v[k];
      }
      sum.store(s + p);
      dot.store(q + p);
    });
  }

  // out[i] = f(access, i, slot, coefficients of its column).
  template <class E, class F>
  void map(T* out, const PerColumn<E, F::count> coefficients, MemoryUse memory, const F& f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(out + start) % vector_bytes == 0 &&
                         stride * sizeof(T) % vector_bytes == 0 && columns % size == 0;
    // As many rows for one reading of coefficients as there are registers for: 0.65 to 1 of the time, most where the
    // coefficients of a row fill the first-level cache. Past the cache one, where a pack is less than a line, so that a
    // line is written in one go.
    constexpr int at_once = vector_bytes == 64 ? 4 : 2, lines_at_once = vector_bytes == 64 ? 4 : 1;
    if (narrow()) {
      map_rows<1>(PartOfPack<T>{columns}, 0, rows, out, coefficients, memory, f);
    } else if (memory.streamed && aligned) {
      const int64_t most = rows / lines_at_once * lines_at_once;
      const StreamedPack<T> access(memory.both);
      map_rows<lines_at_once>(access, 0, most, out, coefficients, memory, f);
      map_rows<1>(access, most, rows, out, coefficients, memory, f);
    } else {
      const int64_t most = rows / at_once * at_once;
      map_rows<at_once>(WholePack<T>{}, 0, most, out, coefficients, memory, f);
      map_rows<1>(WholePack<T>{}, most, rows, out, coefficients, memory, f);
    }
  }

  template <int Rows, class Access, class E, class F>
  void map_rows(const Access access, int64_t first, int64_t last, T* out, const PerColumn<E, F::count> coefficients,
                const MemoryUse memory, const F f) const {
    using L = Lanes<T, E>;
    const int64_t apart = stride, slots_apart = slots_a_row, next = memory.next;
    const bool near = is_near(), unread = memory.unread;
    const int64_t ahead = rows_ahead<Rows>();
    each_pack_of_rows<Rows>(access, first, last, [=](const Access& a, int64_t at, int p, int64_t slots) FASTBN_INLINE {
      L c[F::count];
      for (int k = 0; k < F::count; ++k) c[k] = L::load(coefficients.of[k] + p);
      // Of rows that lie far apart not the inputs that have just been summed: they are in the cache.
      for (int r = 0; r < Rows; ++r) {
        const int64_t row = at + r * apart, then = row + (near ? ahead : Rows * apart);
        if (near || unread) f.prefetch(then);
        f.prefetch_beside(then);
        if (next != 0) f.prefetch(row + next);
        // Outputs of channels_last that stay in the cache: 0.7 to 0.95 of the time where it holds other data before.
        if (near && !Access::streams) fetch(out + then);
      }
      // All loads before the first store: rows often lie a multiple of 4 KiB apart, where a load behind a store
      // looks to the processor as if it read what was stored.
      Pack<T> results[Rows];
      for (int r = 0; r < Rows; ++r) results[r] = f(a, at + r * apart, slots + r * slots_apart, c);
      for (int r = 0; r < Rows; ++r) a.store(results[r], out + at + r * apart);
    });
  }
};
