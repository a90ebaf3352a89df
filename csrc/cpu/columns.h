// In: a block of a matrix whose columns belong to channels. Out: sums per column, and outputs.
// Columns are taken a pack at a time. The last pack of a row overlaps the one before it; what a block that
// is narrower than a pack has, goes through a buffer.

// How a pass that writes outputs meets memory.
struct MemoryUse {
  bool streamed;  // outputs are stored past the cache
  bool both;      // then the residual's gradient, too
  bool unread;    // nobody has just read the inputs: what comes next is to be asked for
  // Elements from an input to its like in the item that comes next, 0 if there is none. Behind sums that one is fetched
  // while this one is written, when the way from memory is free: 0.75 to 0.95 of the time, forward and backward, from 6
  // MB on; smaller tensors 0.8 to 1 where the cache holds other data before, else 1 to 1.05.
  int64_t next;
};

// `Count` values that each column of a pack needs of its channel: get() gives those of the pack whose first column is
// `column`, for packs from left to right. In arrays in pack order the pack is at `place`.

template <class T, class E, int Count>
struct PerColumn {
  static constexpr bool may_be_narrow = true;
  const E* of[Count];

  FASTBN_HD void get(int place, int, Lanes<T, E> (&values)[Count]) {
    for (int k = 0; k < Count; ++k) values[k] = Lanes<T, E>::load(of[k] + place);
  }
};

// Where a channel has as many neighbouring columns as a pack, or more: from registers, and not from arrays that are
// larger than what is read beside them. A pack may lie in two channels. Eval 0.73 to 0.99 of the time, forward +
// backward 0.74 to 0.96.
template <class T, class E, int Count>
struct PerChannel {
  using L = Lanes<T, E>;
  static constexpr bool may_be_narrow = false;
  const E* of[Count];
  int a_channel;
  int channel = 0, end = 0;
  L here[Count];

  PerChannel(const E* const (&values)[Count], int columns_a_channel) : a_channel(columns_a_channel) {
    for (int k = 0; k < Count; ++k) of[k] = values[k];
  }
  FASTBN_HD void enter(int next) {
    channel = next, end = (next + 1) * a_channel;
    for (int k = 0; k < Count; ++k) here[k] = L::all(of[k][next]);
  }
  FASTBN_HD void get(int, int column, L (&values)[Count]) {
    if (column == 0) enter(0);
    for (int k = 0; k < Count; ++k) values[k] = here[k];
    if (column + Pack<T>::size > end) {
      const int first = end - column;
      enter(channel + 1);
      for (int k = 0; k < Count; ++k) replace_from<T, E>(values[k], first, here[k]);
    }
  }
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
  // Whether an array of one value a channel is in pack order.
  bool in_order(int64_t channels) const {
    return !std::is_same_v<T, BFloat16> && columns == channels && columns % size == 0;
  }
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
    if (a_channel >= size) return collect_maps(in, a_channel, sums);
    reorder<T, false>(in, packs() * size);
    if (a_channel == 1) {
      const int64_t plain = narrow() ? columns : whole();
      for (int64_t c = 0; c < columns; c += channels) {
        const int64_t here = smaller<int64_t>(channels, columns - c);
        const int64_t in_place = larger<int64_t>(0, smaller(here, plain - c));
        for (int64_t i = 0; i < in_place; ++i) sums[i] += double(in[c + i]);
        for (int64_t i = in_place; i < here; ++i) sums[i] += double(in[place(int(c + i))]);
      }
      return;
    }
    for (int64_t c = 0; c < columns; c += a_channel) {
      double sum = 0;
      for (int64_t i = 0; i < a_channel; ++i) sum += double(in[place(int(c + i))]);
      *sums++ += sum;
    }
  }

  // Where a channel has as many neighbouring columns as a pack, or more.
  template <class E>
  void collect_maps(const E* in, int64_t a_channel, double* sums) const {
    using L = Lanes<T, E>;
    Vec<double> sum{};
    int64_t end = a_channel;
    const auto add = [&](const L& values) FASTBN_INLINE {
      for (const auto& v : values.v) sum += folded(v);
    };
    const auto finish = [&]() FASTBN_INLINE {
      *sums++ += total<double>(sum);
      sum = Vec<double>{};
      end += a_channel;
    };
    for (int p = 0; p < whole(); p += size) {
      L values = L::load(in + p);
      if (p + size > end) {
        const int left = int(end - p);
        L before = values;
        replace_from<T, E>(before, left);
        add(before);
        finish();
        keep_from<T, E>(values, left);
      }
      add(values);
    }
    if (whole() < columns) {
      L values = L::load(in + whole());
      keep_from<T, E>(values, size - (columns - whole()));
      add(values);
    }
    finish();
  }

  // Adds to a and b, one value a channel, the sums of the terms that f makes, where a channel has as many neighbouring
  // columns as a pack, or more, and rows are few: a pack of columns after the other through all rows, whose sums stay
  // in registers. More rows of two tensors are more pages than the processor knows at once: 32 took 1.05 to 1.15 of the
  // time of four rows at once, 16 took 0.89 to 1.05 and once 1.12, 4 took 0.8 to 0.97.
  static constexpr int64_t few_rows = 16;
  static_assert(few_rows <= float_terms);
  template <class F>
  void sum_maps(int64_t a_channel, PerChannel<T, sum_t<T>, 1> pivots, PerChannel<T, acc_t<T>, 3> for_z, double* a,
                double* b, const F f) const {
    using S = Lanes<T, sum_t<T>>;
    struct Sums {
      LongSum<sum_t<T>> of_terms, of_products;
      FASTBN_HD void add(const S& s, const S& q) {
        for (int k = 0; k < S::vectors; ++k) of_terms.add(s.v[k]), of_products.add(q.v[k]);
      }
    };
    Sums here;  // of the channel
    int64_t end = a_channel;
    const auto finish = [&]() FASTBN_INLINE {
      *a++ += total<double>(here.of_terms.get()), *b++ += total<double>(here.of_products.get());
      here = Sums{}, end += a_channel;
    };
    const int64_t apart = stride, slots_apart = slots_a_row;
    const int64_t ahead = larger<int64_t>(1, bytes_ahead / int64_t(sizeof(T)) / size / rows) * size;
    // Of the pack whose first column it is; `known`: elements that the pack before it had.
    const auto step = [&](int column, int known, int64_t slots) FASTBN_INLINE {
      S c[1]{};
      if constexpr (F::shifted) pivots.get(0, column, c);
      Lanes<T, acc_t<T>> z[3]{};
      if constexpr (F::needs_z) for_z.get(0, column, z);
      const ForZ<T> of_z{z[0], z[1], z[2]};
      S s{}, q{};
      int64_t row = 0;
      const auto add_row = [&]() FASTBN_INLINE {
        const int64_t at = start + row * apart + column;
        f.prefetch(at + ahead);
        S x, y;
        f(WholePack<T>{}, at, slots + row * slots_apart, c[0], of_z, x, y);
        for (int k = 0; k < S::vectors; ++k) s.v[k] += x.v[k], q.v[k] += x.v[k] * y.v[k];
        ++row;
      };
      while (!F::calls && row + 4 <= rows) add_row(), add_row(), add_row(), add_row();
      while (row < rows) add_row();
      if (known > 0) keep_from<T, sum_t<T>>(s, known), keep_from<T, sum_t<T>>(q, known);
      if (const int left = int(end - column); left < size) {
        S s_here = s, q_here = q;
        replace_from<T, sum_t<T>>(s_here, left), replace_from<T, sum_t<T>>(q_here, left);
        here.add(s_here, q_here);
        finish();
        keep_from<T, sum_t<T>>(s, left), keep_from<T, sum_t<T>>(q, left);
      }
      here.add(s, q);
    };
    for (int p = 0; p < columns; p += size) {
      const int column = smaller(p, columns - size);
      step(column, p - column, slot + p / size);
    }
    finish();
  }

  // step(access, element, array index, column, slot) for the packs of rows [first, last), Rows of them at a time: the
  // element and the slot are those of the first row. `apart_last`: the pack that overlaps has code of its own.
  template <int Rows, bool apart_last, class Access, class Step>
  FASTBN_HD void each_pack_of_rows(const Access& access, int64_t first, int64_t last, Step step) const {
    const int last_column = larger(0, columns - size), end = apart_last ? whole() : columns;
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * stride, slots = slot + row * slots_a_row;
      for (int p = 0; p < end; p += size) {
        const int column = apart_last ? p : smaller(p, last_column);
        step(access, base + column, p, column, slots + p / size);
      }
      if (apart_last && end < columns) step(access, base + last_column, end, last_column, slots + end / size);
    }
  }

  // Adds to s and q, in pack order, the terms a and a * b that f makes of the packs of rows [first, last).
  template <class Pivots, class ForZs, class F>
  void accumulate(int64_t first, int64_t last, const Pivots& pivots, const ForZs& for_z, sum_t<T>* s, sum_t<T>* q,
                  const F& f) const {
    if constexpr (Pivots::may_be_narrow) {
      if (narrow()) return add_rows<1>(PartOfPack<T>{columns}, first, last, pivots, for_z, s, q, f);
    }
    constexpr int at_once = F::calls ? 1 : 4;
    const int64_t together = first + (last - first) / at_once * at_once;
    add_rows<at_once>(WholePack<T>{}, first, together, pivots, for_z, s, q, f);
    add_rows<1>(WholePack<T>{}, together, last, pivots, for_z, s, q, f);
  }

  template <int Rows, class Access, class Pivots, class ForZs, class F>
  void add_rows(const Access access, int64_t first, int64_t last, Pivots pivots, ForZs for_z, sum_t<T>* s, sum_t<T>* q,
                const F f) const {
    using S = Lanes<T, sum_t<T>>;
    // By value: a store could change whatever is reached through a reference, and it would be read again.
    const int64_t apart = stride, slots_apart = slots_a_row;
    const bool near = is_near();
    const int64_t ahead = rows_ahead<Rows>();
    const auto step = [=](const Access& a, int64_t at, int p, int column, int64_t slots) mutable FASTBN_INLINE {
      S c[1]{};
      if constexpr (F::shifted) pivots.get(p, column, c);
      Lanes<T, acc_t<T>> z[3]{};
      if constexpr (F::needs_z) for_z.get(p, column, z);
      const ForZ<T> of_z{z[0], z[1], z[2]};
      S sum = S::load(s + p), dot = S::load(q + p);
      for (int r = 0; r < Rows; ++r) {
        f.prefetch(at + r * apart + (near ? ahead : Rows * apart));
        S x, y;
        f(a, at + r * apart, slots + r * slots_apart, c[0], of_z, x, y);
        for (int k = 0; k < S::vectors; ++k) sum.v[k] += x.v[k], dot.v[k] += x.v[k] * y.v[k];
      }
      sum.store(s + p);
      dot.store(q + p);
    };
    // Sums of bfloat16 about pivots from registers take 1.03 to 1.06 of the time in one loop.
    constexpr bool apart_last = !wide_sums<T> && !Pivots::may_be_narrow && !F::calls;
    each_pack_of_rows<Rows, apart_last>(access, first, last, step);
  }

  // out[i] = f(access, i, slot, coefficients of its column).
  template <class Coefficients, class F>
  void map(T* out, const Coefficients& coefficients, MemoryUse memory, const F& f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(out + start) % vector_bytes == 0 &&
                         stride * sizeof(T) % vector_bytes == 0 && columns % size == 0;
    // As many rows for one reading of coefficients as there are registers for: 0.65 to 1 of the time, most where the
    // coefficients of a row fill the first-level cache. Past the cache one, where a pack is less than a line, so that a
    // line is written in one go.
    constexpr int at_once = F::calls ? 1 : vector_bytes == 64 ? 4 : 2, lines_at_once = vector_bytes == 64 ? 4 : 1;
    if constexpr (Coefficients::may_be_narrow) {
      if (narrow()) return map_rows<1>(PartOfPack<T>{columns}, 0, rows, out, coefficients, memory, f);
    }
    const bool streams = memory.streamed && aligned;
    const WholePack<T> access{streams, streams && memory.both};
    const int64_t together = streams && lines_at_once == 1 ? 0 : rows / at_once * at_once;
    map_rows<at_once>(access, 0, together, out, coefficients, memory, f);
    map_rows<1>(access, together, rows, out, coefficients, memory, f);
  }

  template <int Rows, class Access, class Coefficients, class F>
  void map_rows(const Access access, int64_t first, int64_t last, T* out, Coefficients coefficients,
                const MemoryUse memory, const F f) const {
    const int64_t apart = stride, slots_apart = slots_a_row, next = memory.next;
    const bool near = is_near(), unread = memory.unread;
    const int64_t ahead = near ? rows_ahead<Rows>() : Rows * apart;
    // Behind the last rows of an item come the first ones of the next (eval 0.93 to 1.04 of the time).
    const int64_t last_rows = start + (last - Rows) * apart;
    const int64_t wrap = near ? ahead : next - (last - Rows - first) * apart;
    const auto step = [=](const Access& a, int64_t at, int p, int column, int64_t slots) mutable FASTBN_INLINE {
      Lanes<T, acc_t<T>> c[F::count];
      coefficients.get(p, column, c);
      const int64_t then = at + (unread && at >= last_rows ? wrap : ahead);
      // Of rows that lie far apart not the inputs that have just been summed: they are in the cache.
      if (near || unread) {
        for (int r = 0; r < Rows; ++r) f.prefetch(then + r * apart);
      }
      for (int r = 0; r < Rows; ++r) f.prefetch_beside(then + r * apart);
      if (next != 0 && !unread) {
        for (int r = 0; r < Rows; ++r) f.prefetch(at + r * apart + next);
      }
      // Outputs of channels_last that stay in the cache: 0.7 to 0.95 of the time where it holds other data before.
      if (near && !a.streams) {
        for (int r = 0; r < Rows; ++r) fetch(out + then + r * apart);
      }
      // All loads before the first store: rows often lie a multiple of 4 KiB apart, where a load behind a store
      // looks to the processor as if it read what was stored.
      Pack<T> results[Rows];
      for (int r = 0; r < Rows; ++r) results[r] = f(a, at + r * apart, slots + r * slots_apart, c);
      a.template store_rows<Rows>(results, out + at, apart);
    };
    each_pack_of_rows<Rows, false>(access, first, last, step);
  }
};
