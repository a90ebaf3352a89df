// Rows of contiguous values of one channel (channels_first, wide maps).
// Every row has at least Pack<T>::size values, so its end is an overlapping pack instead of a scalar loop. Packs start
// at multiples of their size from the start of the row, which number their slots; the overlapping one comes last.

template <class T>
FASTBN_HD int64_t slot_of(int64_t i) {
  return (i + Pack<T>::size - 1) / Pack<T>::size;
}

// Calls f(i, first, u) for packs at i that cover [from, to); u is 0 to Unroll - 1 and selects an accumulator. Values of
// the last pack before its `first` were covered already.
template <class T, int Unroll, class F>
FASTBN_HD void each_pack(int64_t from, int64_t to, const F& f) {
  constexpr int size = Pack<T>::size;
  int64_t i = from;
  for (; i + size * Unroll <= to; i += size * Unroll) {
    for (int u = 0; u < Unroll; ++u) f(i + u * size, 0, u);
  }
  for (; i < to; i += size) {
    const int64_t at = smaller(i, to - size);
    f(at, i - at, 0);
  }
}

struct Row {
  int64_t offset, length;
  int64_t slot;  // mask slot of its first pack
  int64_t next;  // offset of the row that is read next
};

// The element to prefetch while a row is read at i, in this row or the next one. The hardware prefetcher restarts at
// each page and each row: sums over 56x56 maps are 5-18 % faster, eval in bfloat16 20-40 %;
// NOTES.md#prefetch.
template <class T>
FASTBN_HD int64_t ahead(const Row& row, int64_t i) {
  const int64_t at = i + bytes_ahead / int64_t(sizeof(T));
  return at < row.length ? row.offset + at : row.next + smaller(at - row.length, row.length - 1);
}

// Sums of a and a * b over many rows, where op makes a and b of a pack.
template <class T, class Op>
struct RowReduction {
  using E = sum_t<T>;
  using L = Lanes<T, E>;
  // Enough accumulators to hide the latency of an addition, few enough to stay in registers.
  static constexpr int unroll = Op::calls || L::vectors >= 4 ? 1 : 2;
  // Elements that are accumulated before the sums are added to those in float64; also for float64, as two levels round
  // less.
  static constexpr int64_t stretch = int64_t(float_terms) * unroll * Pack<T>::size;

  Op op;
  L pivot;
  ForwardCoefficients<T> forward_coefficients;
  L s[unroll] = {}, q[unroll] = {};
  Vec<double> first = {}, second = {};
  int64_t pending = 0;
  bool past_cache;

  RowReduction(const Op& t, const L& p, const ForwardCoefficients<T>& z, bool past)
      : op(t), pivot(p), forward_coefficients(z), past_cache(past) {}

  void add(const Row& row) {
    for (int64_t from = 0; from < row.length; from += stretch) {
      const int64_t to = smaller(row.length, from + stretch);
      if (pending + (to - from) > stretch) flush();
      L a[unroll], b[unroll];
      for (int u = 0; u < unroll; ++u) a[u] = s[u], b[u] = q[u];
      const Op t = op;
      const L p = pivot;
      const ForwardCoefficients<T> z = forward_coefficients;
      const Row here = row;
      const bool prefetches = past_cache;
      const auto add = [&](int64_t i, int64_t before, int u, auto places) FASTBN_INLINE {
        constexpr int number = decltype(places)::number;
        if (prefetches) {
          for (int p = 0; p < number; ++p) t.prefetch(ahead<T>(here, i + p * Pack<T>::size));
        }
        L x[number], y[number];
        t(WholePack<T>{}, Places<number>{here.offset + i, Pack<T>::size, here.slot + slot_of<T>(i), 1}, p, z, x, y);
        if (before != 0) keep_from<T, E>(x[0], int(before)), keep_from<T, E>(y[0], int(before));
        for (int n = 0; n < number; ++n) {
          for (int k = 0; k < L::vectors; ++k) a[u].v[k] += x[n].v[k], b[u].v[k] += x[n].v[k] * y[n].v[k];
        }
      };
      int64_t i = from;
      constexpr int together = 4;  // packs for which a function is called
      for (; Op::calls && i + together * Pack<T>::size <= to; i += together * Pack<T>::size) {
        add(i, 0, 0, Places<together>{});
      }
      each_pack<T, unroll>(i, to,
                           [&](int64_t i, int64_t before, int u) FASTBN_INLINE { add(i, before, u, Places<1>{}); });
      for (int u = 0; u < unroll; ++u) s[u] = a[u], q[u] = b[u];
      pending += to - from;
    }
  }

  void flush() {
    for (int u = 0; u < unroll; ++u) {
      for (const auto& v : s[u].v) first += widen_add(v);
      for (const auto& v : q[u].v) second += widen_add(v);
      s[u] = q[u] = {};
    }
    pending = 0;
  }
};

// f(io, i, packs) makes the packs of a row that begin at i; only the overlap at the end is written twice. Streaming
// stores write whole cache lines; packs then start at multiples of their size only if out is aligned to a vector.
template <class T, bool calls, class IO, class F>
FASTBN_HD void map_row(const IO& io, T* out, int64_t length, const F& f) {
  constexpr int size = Pack<T>::size;
  constexpr int unroll = 4, together = calls ? unroll : 1;
  const WholePack<T> whole;
  const auto put = [&](const auto& how, int64_t i, auto places) FASTBN_INLINE {
    Pack<T> packs[decltype(places)::number];
    f(how, i, packs);
    for (int p = 0; p < places.number; ++p) how.store(packs[p], out + i + p * size);
  };
  int64_t i = 0;
  if (io.streams) {
    constexpr int64_t line = 64;
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(out) % line);
    if (misaligned != 0) {
      const int64_t head = smaller((line - misaligned) / int64_t(sizeof(T)), length / size * size);
      for (; i < head; i += size) put(whole, i, Places<1>{});
      i = head;
    }
  }
  for (; i + size * unroll <= length; i += size * unroll) {
    for (int u = 0; u < unroll; u += together) put(io, i + u * size, Places<together>{});
  }
  for (; i < length; i += size) put(whole, smaller(i, length - size), Places<1>{});
}

// The same for four rows of one length, of whole aligned packs; of(row) is their f. Several write streams use memory
// better: up to 20 % faster with streaming stores and for eval in 16-bit types, but slower in cache (50 % with a
// residual) and for float32 eval or a residual gradient (15-20 %); NOTES.md#rows-at-a-time.
template <class T, class IO, class Of>
FASTBN_HD void map_four_rows(const IO& io, T* out, const Row (&rows)[4], const Of& of) {
  const auto f0 = of(rows[0]), f1 = of(rows[1]), f2 = of(rows[2]), f3 = of(rows[3]);
  T *const out0 = out + rows[0].offset, *const out1 = out + rows[1].offset;
  T *const out2 = out + rows[2].offset, *const out3 = out + rows[3].offset;
  const int64_t length = rows[0].length;
  for (int64_t i = 0; i < length; i += Pack<T>::size) {
    Pack<T> p[4][1];
    f0(io, i, p[0]), f1(io, i, p[1]), f2(io, i, p[2]), f3(io, i, p[3]);
    io.store(p[0][0], out0 + i);
    io.store(p[1][0], out1 + i);
    io.store(p[2][0], out2 + i);
    io.store(p[3][0], out3 + i);
  }
}
