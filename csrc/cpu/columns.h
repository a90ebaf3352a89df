// Blocks of a matrix whose columns belong to channels, processed one pack of columns at a time. The last pack of a row
// overlaps the one before it; a block narrower than a pack goes through a buffer.

// How a pass that writes outputs uses the caches.
struct MemoryUse {
  bool both;    // streaming stores for the residual's gradient too
  bool unread;  // no reduction has read the inputs
  // Distance in elements to the same place in the next channel tile, which is prefetched while this one is written; 0:
  // none. 5-25 % faster from 6 MB on, up to 5 % slower when everything is in cache;
  // NOTES.md#prefetch.
  int64_t next;
};

// `Count` values that each column of a pack needs of its channel. get() returns those of the pack whose first column is
// `column`, for packs from left to right; `place` is its index in arrays in pack order.

template <class T, class E, int Count>
struct PerColumn {
  static constexpr bool may_be_narrow = true;
  const E* of[Count];

  FASTBN_HD void get(int place, int, Lanes<T, E> (&values)[Count]) {
    for (int k = 0; k < Count; ++k) values[k] = Lanes<T, E>::load(of[k] + place);
  }
};

// For channels of at least a pack of neighbouring columns: values are kept in registers instead of arrays, which would
// be larger than the data. A pack may straddle two channels. Eval is up to 27 % faster;
// NOTES.md#small-maps.
template <class T, class E, int Count>
struct PerChannel {
  using L = Lanes<T, E>;
  static constexpr bool may_be_narrow = false;
  const E* of[Count];
  int channel_width;
  int channel = 0, end = 0;
  L here[Count];

  PerChannel(const E* const (&values)[Count], int columns_per_channel) : channel_width(columns_per_channel) {
    for (int k = 0; k < Count; ++k) of[k] = values[k];
  }
  FASTBN_HD void enter(int next) {
    channel = next, end = (next + 1) * channel_width;
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
struct ColumnBlock {
  static constexpr int size = Pack<T>::size;

  int64_t start;   // element where the block begins
  int64_t stride;  // elements from one row to the next
  int64_t rows;
  int columns;   // at most max_columns
  int64_t slot;  // of the mask, of the first pack
  int64_t slots_per_row;
  // The tensors of the pass do not fit into the cache: prefetch, and use streaming stores. Where they fit there is
  // little to wait for, and prefetch instructions are up to a third of a pass (NOTES.md#prefetch).
  bool past_cache;

  bool narrow() const { return columns < size; }
  // Whether an array of one value per channel is in pack order already.
  bool in_order(int64_t channels) const {
    return !std::is_same_v<T, BFloat16> && columns == channels && columns % size == 0;
  }
  // Rows are prefetched by software, because the hardware prefetcher sees several interleaved rows as short streams.
  // Rows that are near each other are prefetched `rows_ahead` (channels_last that exceeds the caches: 7-33 % faster),
  // others one step ahead; NOTES.md#prefetch.
  bool is_near() const { return stride * int64_t(sizeof(T)) <= 16 << 10; }
  // The prefetch distance: bytes_ahead, rounded up to whole steps of Rows rows.
  template <int Rows>
  int64_t rows_ahead() const {
    const int64_t step = Rows * stride;  // 0 for the spare elements, which are a row of their own
    return ceil_div(bytes_ahead / int64_t(sizeof(T)), larger<int64_t>(1, step)) * step;
  }
  // Sums about a pivot of types that seldom need one: compiled small, instead of fast (NOTES.md#compile-time).
  template <class F>
  static constexpr bool is_rare = F::shifted && starts_at_zero<T>;
  int whole() const { return columns / size * size; }
  int packs() const { return int(ceil_div(columns, size)); }
  // Index of a column in arrays in pack order: the overlapping pack is stored behind whole().
  int place(int column) const { return column < whole() || narrow() ? column : column + whole() + size - columns; }

  // Expands one value per channel to an array in pack order. `channel_width` neighbouring columns belong to a channel;
  // the channels repeat after `channels` of them.
  template <class E>
  void expand(const E* values, int64_t channels, int64_t channel_width, E* out) const {
    if (channel_width == 1) {
      for (int64_t c = 0; c < columns; c += channels) {
        memcpy(out + c, values, smaller<int64_t>(channels, columns - c) * sizeof(E));
      }
    } else {
      for (int64_t c = 0, channel = 0; c < columns; c += channel_width, ++channel) {
        for (int64_t i = 0; i < channel_width; ++i) out[c + i] = values[channel];
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

  // The reverse: adds an array in pack order to one sum per channel, in a fixed order. Consumes the array.
  template <class E>
  void collect(E* in, int64_t channels, int64_t channel_width, double* sums) const {
    if (channel_width >= size) return collect_maps(in, channel_width, sums);
    reorder<T, false>(in, packs() * size);
    if (channel_width == 1) {
      const int64_t plain = narrow() ? columns : whole();
      for (int64_t c = 0; c < columns; c += channels) {
        const int64_t here = smaller<int64_t>(channels, columns - c);
        const int64_t in_place = larger<int64_t>(0, smaller(here, plain - c));
        for (int64_t i = 0; i < in_place; ++i) sums[i] += double(in[c + i]);
        for (int64_t i = in_place; i < here; ++i) sums[i] += double(in[place(int(c + i))]);
      }
      return;
    }
    for (int64_t c = 0; c < columns; c += channel_width) {
      double sum = 0;
      for (int64_t i = 0; i < channel_width; ++i) sum += double(in[place(int(c + i))]);
      *sums++ += sum;
    }
  }

  // For channels of at least a pack of neighbouring columns.
  template <class E>
  void collect_maps(const E* in, int64_t channel_width, double* sums) const {
    using L = Lanes<T, E>;
    Vec<double> sum{};
    int64_t end = channel_width;
    const auto add = [&](const L& values) FASTBN_INLINE {
      for (const auto& v : values.v) sum += widen_add(v);
    };
    const auto end_channel = [&]() FASTBN_INLINE {
      *sums++ += total<double>(sum);
      sum = Vec<double>{};
      end += channel_width;
    };
    for (int p = 0; p < whole(); p += size) {
      L values = L::load(in + p);
      if (p + size > end) {
        const int left = int(end - p);
        L before = values;
        replace_from<T, E>(before, left);
        add(before);
        end_channel();
        keep_from<T, E>(values, left);
      }
      add(values);
    }
    if (whole() < columns) {
      L values = L::load(in + whole());
      keep_from<T, E>(values, size - (columns - whole()));
      add(values);
    }
    end_channel();
  }

  // Adds to a and b, one value per channel, the sums of the terms that f makes; for channels of at least a pack of
  // neighbouring columns and few rows. Each pack of columns goes through all rows with its sums in registers. With more
  // rows the pages exceed the TLB: 3-20 % faster with 4 rows, 5-15 % slower with 32;
  // NOTES.md#small-maps.
  static constexpr int64_t few_rows = 16;
  static_assert(few_rows <= float_terms);
  template <class F>
  void sum_maps(int64_t channel_width, PerChannel<T, sum_t<T>, 1> pivots,
                PerChannel<T, acc_t<T>, 3> forward_coefficients, double* a, double* b, const F f) const {
    using S = Lanes<T, sum_t<T>>;
    struct Sums {
      LongSum<sum_t<T>> of_terms, of_products;
      FASTBN_HD void add(const S& s, const S& q) {
        for (int k = 0; k < S::vectors; ++k) of_terms.add(s.v[k]), of_products.add(q.v[k]);
      }
    };
    Sums here;  // of the channel
    int64_t end = channel_width;
    const auto end_channel = [&]() FASTBN_INLINE {
      *a++ += total<double>(here.of_terms.get()), *b++ += total<double>(here.of_products.get());
      here = Sums{}, end += channel_width;
    };
    const int64_t apart = stride, slots_apart = slots_per_row;
    const bool prefetches = past_cache;
    const int64_t ahead = larger<int64_t>(1, bytes_ahead / int64_t(sizeof(T)) / size / rows) * size;
    // The pack that starts at `column`; `known`: elements that the previous pack covered.
    const auto step = [&](int column, int known, int64_t slots) FASTBN_INLINE {
      S c[1]{};
      if constexpr (F::shifted) pivots.get(0, column, c);
      Lanes<T, acc_t<T>> z[3]{};
      if constexpr (F::needs_z) forward_coefficients.get(0, column, z);
      const ForwardCoefficients<T> of_z{z[0], z[1], z[2]};
      S s{}, q{};
      int64_t row = 0;
      // The next rows.
      const auto add = [&](auto places) FASTBN_INLINE {
        constexpr int number = decltype(places)::number;
        const Places<number> at{start + row * apart + column, apart, slots + row * slots_apart, slots_apart};
        if (prefetches) {
          for (int r = 0; r < number; ++r) f.prefetch(at.element(r) + ahead);
        }
        S x[number], y[number];
        f(WholePack<T>{}, at, c[0], of_z, x, y);
        for (int r = 0; r < number; ++r) {
          for (int k = 0; k < S::vectors; ++k) s.v[k] += x[r].v[k], q.v[k] += x[r].v[k] * y[r].v[k];
        }
        row += number;
      };
      while (row + 4 <= rows) {
        if constexpr (F::calls) {
          add(Places<4>{});
        } else {
          for (int r = 0; r < 4; ++r) add(Places<1>{});
        }
      }
      while (row < rows) add(Places<1>{});
      if (known > 0) keep_from<T, sum_t<T>>(s, known), keep_from<T, sum_t<T>>(q, known);
      if (const int left = int(end - column); left < size) {
        S s_here = s, q_here = q;
        replace_from<T, sum_t<T>>(s_here, left), replace_from<T, sum_t<T>>(q_here, left);
        here.add(s_here, q_here);
        end_channel();
        keep_from<T, sum_t<T>>(s, left), keep_from<T, sum_t<T>>(q, left);
      }
      here.add(s, q);
    };
    for (int p = 0; p < columns; p += size) {
      const int column = smaller(p, columns - size);
      step(column, p - column, slot + p / size);
    }
    end_channel();
  }

  // Calls step(io, element, array index, column, slot) for the packs of rows [first, last), Rows of them at a time:
  // element and slot are those of the first row. `apart_last`: the overlapping pack has a loop of its own.
  template <int Rows, bool apart_last, class IO, class Step>
  FASTBN_HD void each_pack_of_rows(const IO& io, int64_t first, int64_t last, Step step) const {
    const int last_column = larger(0, columns - size), end = apart_last ? whole() : columns;
    for (int64_t row = first; row < last; row += Rows) {
      const int64_t base = start + row * stride, slots = slot + row * slots_per_row;
      for (int p = 0; p < end; p += size) {
        const int column = apart_last ? p : smaller(p, last_column);
        step(io, base + column, p, column, slots + p / size);
      }
      if (apart_last && end < columns) step(io, base + last_column, end, last_column, slots + end / size);
    }
  }

  // Adds to s and q, in pack order, the terms a and a * b that f makes of the packs of rows [first, last).
  template <class Pivots, class ForwardCoefficientSource, class F>
  void accumulate(int64_t first, int64_t last, const Pivots& pivots,
                  const ForwardCoefficientSource& forward_coefficients, sum_t<T>* s, sum_t<T>* q, const F& f) const {
    if constexpr (Pivots::may_be_narrow) {
      if (narrow())
        return add_rows<1>(PartOfPack<T>{columns}, first, last, false, pivots, forward_coefficients, s, q, f);
    }
    constexpr int at_once = is_rare<F> ? 2 : F::calls ? 4 : 8;
    const int64_t together = first + (last - first) / at_once * at_once;
    add_rows<at_once>(WholePack<T>{}, first, together, past_cache, pivots, forward_coefficients, s, q, f);
    add_rows<1>(WholePack<T>{}, together, last, false, pivots, forward_coefficients, s, q, f);
  }

  template <int Rows, class IO, class Pivots, class ForwardCoefficientSource, class F>
  void add_rows(const IO io, int64_t first, int64_t last, const bool prefetches, Pivots pivots,
                ForwardCoefficientSource forward_coefficients, sum_t<T>* s, sum_t<T>* q, const F f) const {
    using S = Lanes<T, sum_t<T>>;
    // By value: a store may alias whatever is reached through a reference, which would be reloaded.
    const int64_t apart = stride, slots_apart = slots_per_row;
    const bool near = is_near();
    const int64_t ahead = rows_ahead<Rows>();
    const auto step = [=](const IO& a, int64_t at, int p, int column, int64_t slots) mutable FASTBN_INLINE {
      S c[1]{};
      if constexpr (F::shifted) pivots.get(p, column, c);
      Lanes<T, acc_t<T>> z[3]{};
      if constexpr (F::needs_z) forward_coefficients.get(p, column, z);
      const ForwardCoefficients<T> of_z{z[0], z[1], z[2]};
      // Two accumulators for each sum, of even and of odd rows: half the latency.
      constexpr int chains = Rows > 1 ? 2 : 1;
      S sum[chains]{}, dot[chains]{};
      sum[0] = S::load(s + p), dot[0] = S::load(q + p);
      if (prefetches) {
        for (int r = 0; r < Rows; ++r) f.prefetch(at + r * apart + (near ? ahead : Rows * apart));
      }
      // Row by row, so that terms stay in registers, unless a function is called for them.
      constexpr int together = F::calls ? Rows : 1;
      for (int r = 0; r < Rows; r += together) {
        S x[together], y[together];
        f(a, Places<together>{at + r * apart, apart, slots + r * slots_apart, slots_apart}, c[0], of_z, x, y);
        for (int t = 0; t < together; ++t) {
          S &u = sum[(r + t) % chains], &v = dot[(r + t) % chains];
          for (int k = 0; k < S::vectors; ++k) u.v[k] += x[t].v[k], v.v[k] += x[t].v[k] * y[t].v[k];
        }
      }
      for (int k = 0; k < S::vectors && chains > 1; ++k) {
        sum[0].v[k] += sum[chains - 1].v[k], dot[0].v[k] += dot[chains - 1].v[k];
      }
      sum[0].store(s + p);
      dot[0].store(q + p);
    };
    // One loop is 3-6 % slower for bfloat16 sums with pivots in registers; NOTES.md#compile-time.
    constexpr bool apart_last = !wide_sums<T> && !Pivots::may_be_narrow;
    each_pack_of_rows<Rows, apart_last>(io, first, last, step);
  }

  // out[i] = f(io, i, slot, coefficients of its column).
  template <class Coefficients, class F>
  void map(T* out, const Coefficients& coefficients, MemoryUse memory, const F& f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(out + start) % vector_bytes == 0 &&
                         stride * sizeof(T) % vector_bytes == 0 && columns % size == 0;
    // Rows that share one load of the coefficients, and one call of a function. Four where coefficients of small maps
    // are blended for each row of packs; with more than two, channels_last is up to 15 % slower past L2. Streaming
    // stores go row by row if a pack is less than a cache line, so that a line is written in one go.
    // NOTES.md#rows-at-a-time.
    constexpr int at_once = vector_bytes == 64 && (F::calls || !Coefficients::may_be_narrow) ? 4 : 2;
    constexpr bool one_line = vector_bytes == 64;
    if constexpr (Coefficients::may_be_narrow) {
      if (narrow()) return map_rows<1>(PartOfPack<T>{columns}, 0, rows, false, out, coefficients, memory, f);
    }
    const bool streams = past_cache && aligned;
    const WholePack<T> io{streams, streams && memory.both};
    const int64_t together = streams && !one_line ? 0 : rows / at_once * at_once;
    map_rows<at_once>(io, 0, together, past_cache, out, coefficients, memory, f);
    map_rows<1>(io, together, rows, past_cache && !one_line, out, coefficients, memory, f);
  }

  template <int Rows, class IO, class Coefficients, class F>
  void map_rows(const IO io, int64_t first, int64_t last, const bool prefetches, T* out, Coefficients coefficients,
                const MemoryUse memory, const F f) const {
    const int64_t apart = stride, slots_apart = slots_per_row, next = memory.next;
    const bool near = is_near(), unread = memory.unread;
    const int64_t ahead = near ? rows_ahead<Rows>() : Rows * apart;
    // The last rows of a channel tile prefetch the first ones of the next.
    const int64_t last_rows = start + (last - Rows) * apart;
    const int64_t wrap = near ? ahead : next - (last - Rows - first) * apart;
    const auto step = [=](const IO& a, int64_t at, int p, int column, int64_t slots) mutable FASTBN_INLINE {
      Lanes<T, acc_t<T>> c[F::count];
      coefficients.get(p, column, c);
      if (prefetches) {
        const int64_t then = at + (unread && at >= last_rows ? wrap : ahead);
        // Rows that are far apart need no prefetch of inputs that were just reduced: they are in cache.
        if (near || unread) {
          for (int r = 0; r < Rows; ++r) f.prefetch(then + r * apart);
        }
        for (int r = 0; r < Rows; ++r) f.prefetch_extra(then + r * apart);
        if (next != 0 && !unread) {
          for (int r = 0; r < Rows; ++r) f.prefetch(at + r * apart + next);
        }
        // Prefetch outputs that stay in cache: 5-30 % faster for channels_last if the cache is cold;
        // NOTES.md#prefetch.
        if (near && !a.streams) {
          for (int r = 0; r < Rows; ++r) fetch(out + then + r * apart);
        }
      }
      // All loads precede the first store: rows are often a multiple of 4 KiB apart, and a load behind such a store
      // stalls on 4K aliasing.
      Pack<T> results[Rows];
      f(a, Places<Rows>{at, apart, slots, slots_apart}, c, results);
      a.template store_rows<Rows>(results, out + at, apart);
    };
    each_pack_of_rows<Rows, false>(io, first, last, step);
  }
};
