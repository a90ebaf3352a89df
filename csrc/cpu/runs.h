// In: runs of contiguous values of one channel (channels_first, wide maps). Out: sums, and outputs.
// Every run has at least Pack<T>::size values, so its end is an overlapping pack instead of a scalar loop. Packs begin
// at multiples of their size from the run's begin, and have their numbers as slots; the overlapping one comes last.

template <class T>
FASTBN_HD int64_t slot_of(int64_t i) {
  return (i + Pack<T>::size - 1) / Pack<T>::size;
}

// Calls f(i, first, u) for packs at i that cover [from, to): u counts 0 to Unroll - 1 for accumulators that do not
// wait for each other. Values of the last pack before its `first` were covered already.
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

struct Run {
  int64_t offset, length;
  int64_t slot;  // of its first pack
  int64_t next;  // offset of the run that is read after it
};

// What to fetch while a run is read at i, in the run or in the next one. The processor's own prefetcher begins anew at
// each page and each run: sums over 56x56 maps took 0.82 to 0.95 of the time so, eval in bfloat16 0.6 to 0.8.
template <class T>
FASTBN_HD int64_t ahead(const Run& run, int64_t i) {
  const int64_t at = i + bytes_ahead / int64_t(sizeof(T));
  return at < run.length ? run.offset + at : run.next + smaller(at - run.length, run.length - 1);
}

// The two sums over many runs that both passes need, of a and of a * b, where terms makes a and b of a pack.
template <class T, class Terms>
struct PairOfSums {
  using E = sum_t<T>;
  using L = Lanes<T, E>;
  // Enough accumulators to hide the latency of an addition, few enough to stay in registers.
  static constexpr int unroll = Terms::calls || L::vectors >= 4 ? 1 : 2;
  // Elements that are summed before the sums are added to those in double; sums of doubles too, as two levels round
  // less.
  static constexpr int64_t stretch = int64_t(float_terms) * unroll * Pack<T>::size;

  Terms terms;
  L pivot;
  ForZ<T> for_z;
  L s[unroll] = {}, q[unroll] = {};
  Vec<double> first = {}, second = {};
  int64_t pending = 0;

  PairOfSums(const Terms& t, const L& p, const ForZ<T>& z) : terms(t), pivot(p), for_z(z) {}

  void add(const Run& run) {
    for (int64_t from = 0; from < run.length; from += stretch) {
      const int64_t to = smaller(run.length, from + stretch);
      if (pending + (to - from) > stretch) flush();
      L a[unroll], b[unroll];
      for (int u = 0; u < unroll; ++u) a[u] = s[u], b[u] = q[u];
      const Terms t = terms;
      const L p = pivot;
      const ForZ<T> z = for_z;
      const Run here = run;
      each_pack<T, unroll>(from, to, [&](int64_t i, int64_t before, int u) FASTBN_INLINE {
        t.prefetch(ahead<T>(here, i));
        L x, y;
        t(WholePack<T>{}, here.offset + i, here.slot + slot_of<T>(i), p, z, x, y);
        if (before != 0) keep_from<T, E>(x, int(before)), keep_from<T, E>(y, int(before));
        for (int k = 0; k < L::vectors; ++k) a[u].v[k] += x.v[k], b[u].v[k] += x.v[k] * y.v[k];
      });
      for (int u = 0; u < unroll; ++u) s[u] = a[u], q[u] = b[u];
      pending += to - from;
    }
  }

  void flush() {
    for (int u = 0; u < unroll; ++u) {
      for (const auto& v : s[u].v) first += folded(v);
      for (const auto& v : q[u].v) second += folded(v);
      s[u] = q[u] = {};
    }
    pending = 0;
  }
};

// out[i] = f(access, i) for the packs of a run, each value written once but for the overlap at the end. Past the cache
// go whole lines; packs then begin at multiples of their size only if a vector at out is aligned.
template <class T, class Access, class F>
FASTBN_HD void map_run(const Access& access, T* out, int64_t length, const F& f) {
  constexpr int size = Pack<T>::size;
  constexpr int unroll = 4;
  const WholePack<T> whole;
  int64_t i = 0;
  if (access.streams) {
    constexpr int64_t line = 64;
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(out) % line);
    if (misaligned != 0) {
      const int64_t head = smaller((line - misaligned) / int64_t(sizeof(T)), length / size * size);
      for (; i < head; i += size) whole.store(f(whole, i), out + i);
      i = head;
    }
  }
  for (; i + size * unroll <= length; i += size * unroll) {
    for (int u = 0; u < unroll; ++u) access.store(f(access, i + u * size), out + i + u * size);
  }
  for (; i < length; i += size) {
    const int64_t at = smaller(i, length - size);
    whole.store(f(whole, at), out + at);
  }
}

// The same for four runs of one length, of whole packs that are aligned: of(run) is their f. Memory does better with
// several places at once: past the cache 0.8 to 1 of the time, eval of types of two bytes 0.8 to 0.97. But 1.5 where
// the cache holds all tensors of a layer with a residual, and in float32 1.15 with the residual's gradient, 1.2 in
// eval.
template <class T, class Access, class Of>
FASTBN_HD void map_four_runs(const Access& access, T* out, const Run (&runs)[4], const Of& of) {
  const auto f0 = of(runs[0]), f1 = of(runs[1]), f2 = of(runs[2]), f3 = of(runs[3]);
  T *const out0 = out + runs[0].offset, *const out1 = out + runs[1].offset;
  T *const out2 = out + runs[2].offset, *const out3 = out + runs[3].offset;
  const int64_t length = runs[0].length;
  for (int64_t i = 0; i < length; i += Pack<T>::size) {
    const Pack<T> p0 = f0(access, i), p1 = f1(access, i), p2 = f2(access, i), p3 = f3(access, i);
    access.store(p0, out0 + i);
    access.store(p1, out1 + i);
    access.store(p2, out2 + i);
    access.store(p3, out3 + i);
  }
}
