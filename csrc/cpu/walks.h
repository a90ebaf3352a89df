// In: a plan, an item of channels and a segment of the batch. Out: the four primitives on that piece:
// sums for stats and grad_stats, and map for apply and grad_apply. One struct for each walk, with the same members.

// Values of one channel that are looked at to guess its mean before it is summed, where sums need a pivot.
constexpr int64_t samples = 8;

struct Piece {
  int64_t first_channel, channels;
  int64_t segment;
};

// What is wrong with a guess shows in the sums. True: read the piece once more with the better pivot.
template <class T>
FASTBN_HD bool improve_pivot(double n, double sum, const Moments& m, sum_t<T>& pivot) {
  if (pivot_was_good(n, sum, m, pivot_allowed<T>)) return false;
  const sum_t<T> better = pivot_near<T>(m.mean);
  const bool differs = better != pivot;
  pivot = better;
  return differs;
}

// The sum of dy * (x - mean) from that of dy * (x - pivot).
FASTBN_HD double about_mean(double dot, double sum, double mean, double pivot) {
  return mean == pivot ? dot : dot - (mean - pivot) * sum;
}

template <class T>
struct RunsWalk {
  using A = acc_t<T>;
  using E = sum_t<T>;
  using P = Pack<T>;
  using L = Lanes<T, E>;
  using C = Lanes<T, A>;
  const Plan& plan;
  const Shape& shape;

  // body(run) for every run of the piece's k-th channel; backwards what was read last comes first.
  template <class Body>
  FASTBN_HD void each_run(const Piece& piece, int64_t k, bool backwards, const Body& body) const {
    const int64_t parts = plan.parts();
    const int64_t n0 = piece.segment / parts * plan.segment_samples;
    const int64_t n1 = smaller(shape.N, n0 + plan.segment_samples);
    const int64_t part = piece.segment % parts, s0 = part * plan.segment_positions;
    const int64_t length = smaller(plan.segment_positions, shape.S - s0);
    const int64_t channel = piece.first_channel + k, slots = plan.slots_a_row(P::size);
    for (int64_t i = n0; i < n1; ++i) {
      const int64_t n = backwards ? n0 + n1 - 1 - i : i;
      const int64_t map = n * shape.C + channel;
      const int64_t offset = map * shape.S + s0, apart = shape.C * shape.S * (backwards ? -1 : 1);
      body(Run{offset, length, (map * parts + part) * slots, i + 1 < n1 ? offset + apart : offset});
    }
  }

  int64_t count(const Piece& piece) const {
    int64_t n = 0;
    each_run(piece, 0, false, [&](const Run& run) { n += run.length; });
    return n;
  }

  E guess(const T* x, const Piece& piece, int64_t k) const {
    int64_t runs = 0;
    each_run(piece, k, false, [&](const Run&) { ++runs; });
    const int64_t apart = ceil_div(runs, samples);
    double sum = 0;
    int64_t number = 0, n = 0;
    each_run(piece, k, false, [&](const Run& run) {
      if (number++ % apart != 0) return;
      sum += double(to_acc(x[run.offset + number * 37 % run.length]));
      sum += double(to_acc(x[run.offset + (number * 37 + run.length / 2) % run.length]));
      n += 2;
    });
    return pivot_near<T>(sum / double(n));
  }

  template <class Terms>
  std::pair<double, double> sums(const Piece& piece, int64_t k, E pivot, const Terms& terms, const ForZ<T>& z) const {
    PairOfSums<T, Terms> pair(terms, L::all(pivot), z);
    each_run(piece, k, false, [&](const Run& run) { pair.add(run); });
    pair.flush();
    return {total<double>(pair.first), total<double>(pair.second)};
  }

  void stats(const T* x, const Piece& piece, double* mean, double* m2) const {
    const double n = double(count(piece));
    for (int64_t k = 0; k < piece.channels; ++k) {
      E pivot = wide_sums<T> ? E(0) : guess(x, piece, k);
      Moments m{};
      const auto improved = [&](const auto& terms) {
        const auto [sum, squares] = sums(piece, k, pivot, terms, ForZ<T>{});
        m = from_shifted_sums(n, double(pivot), sum, squares);
        return improve_pivot<T>(n, sum, m, pivot);
      };
      if (improved(FirstDeviations<T>{x})) improved(Deviations<T, true>{x});
      mean[k] = m.mean, m2[k] = m.m2;
      if (sizeof(E) == 4 && !__builtin_isfinite(m.m2)) exact(x, piece, k, n, mean[k], m2[k]);
    }
  }

  // Values too large for their squares to fit in a float, or not finite: plainly, in double.
  void exact(const T* x, const Piece& piece, int64_t k, double n, double& mean, double& m2) const {
    double sum = 0;
    m2 = 0;
    each_run(piece, k, false, [&](const Run& run) {
      for (int64_t i = 0; i < run.length; ++i) sum += double(to_acc(x[run.offset + i]));
    });
    mean = sum / n;
    each_run(piece, k, false, [&](const Run& run) {
      for (int64_t i = 0; i < run.length; ++i) {
        const double d = double(to_acc(x[run.offset + i])) - mean;
        m2 += d * d;
      }
    });
  }

  // for_z: mean, scale and shift of the forward pass, of each of the piece's channels, where terms need them.
  template <class Source>
  void grad_stats(const T* x, const Source& source, const Piece& piece, const double* mean, const double* variance,
                  const A* const (&for_z)[3], double* sum, double* dot) const {
    for (int64_t k = 0; k < piece.channels; ++k) {
      const E pivot = gradient_pivot<T>(mean[k], variance[k]);
      ForZ<T> z{};
      if (Source::needs_z) z = {C::all(for_z[0][k]), C::all(for_z[1][k]), C::all(for_z[2][k])};
      std::tie(sum[k], dot[k]) = pivot == 0 ? sums(piece, k, pivot, PlainGradTerms<T, Source>{x, source}, z)
                                            : sums(piece, k, pivot, GradTerms<T, Source, true>{x, source}, z);
      dot[k] = about_mean(dot[k], sum[k], mean[k], double(pivot));
    }
  }

  template <class F>
  void map(T* out, const Piece& piece, MemoryUse memory, const A* const (&coefficients)[F::count], const F& f) const {
    for (int64_t k = piece.channels - 1; k >= 0; --k) {
      C c[F::count];
      for (int i = 0; i < F::count; ++i) c[i] = C::all(coefficients[i][k]);
      const bool unread = memory.unread, streamed = memory.streamed;
      const int64_t next = memory.next;
      // All by value: a store could change whatever is reached through a reference.
      const auto of_run = [=](const Run& run) FASTBN_INLINE {
        return [=](const auto& access, int64_t i) FASTBN_INLINE {
          const int64_t then = ahead<T>(run, i);
          if (unread) {
            f.prefetch(then);
            if (!streamed) fetch(out + then);  // 0.75 to 0.95 of the time, 1.03 in a loop
          }
          f.prefetch_beside(then);
          if (next != 0 && !unread) f.prefetch(run.offset + i + next);
          return f(access, run.offset + i, run.slot + slot_of<T>(i), c);
        };
      };
      const auto alone = [&](const Run& run) {
        const bool in_order = reinterpret_cast<uintptr_t>(out + run.offset) % vector_bytes == 0;
        const bool streams = memory.streamed && (in_order || !f.in_slots());
        map_run(WholePack<T>{streams, streams && memory.both}, out + run.offset, run.length, of_run(run));
      };
      // See map_four_runs.
      const bool several =
          vector_bytes == 64 && (sizeof(T) == 2 ? streamed || unread : streamed && !unread && !memory.both);
      Run waiting[4];
      int number = 0;
      each_run(piece, k, true, [&](const Run& run) {
        const bool whole =
            reinterpret_cast<uintptr_t>(out + run.offset) % vector_bytes == 0 && run.length % P::size == 0;
        if (!several || !whole) return alone(run);
        waiting[number++] = run;
        if (number < 4) return;
        number = 0;
        map_four_runs(WholePack<T>{streamed, streamed && memory.both}, out, waiting, of_run);
      });
      for (int r = 0; r < number; ++r) alone(waiting[r]);
    }
  }
};

template <class T>
struct ColumnsWalk {
  using A = acc_t<T>;
  using E = sum_t<T>;
  using P = Pack<T>;
  using L = Lanes<T, A>;
  using S = Lanes<T, E>;
  using Block = Columns<T>;
  const Plan& plan;
  const Shape& shape;

  // Rows that are summed before the sums go to double, which they may be already.
  static constexpr int64_t most_rows = sizeof(E) == 8 ? 1 << 20 : float_terms;
  static constexpr int width = int(max_columns) + P::size;

  // A second block holds the elements behind the last full row, if there are any.
  template <class Body>
  void each_block(const Piece& piece, const Body& body) const {
    const int64_t a_channel = plan.columns_a_channel;
    const int64_t first = piece.segment * plan.segment_rows;
    const int64_t rows = smaller(plan.segment_rows, plan.rows - first);
    const int64_t columns =
        plan.columns == shape.C * a_channel ? piece.channels * a_channel : plan.columns;  // else rows were folded
    const int64_t start = first * plan.columns + piece.first_channel * a_channel;
    const int64_t slots = plan.slots_a_row(P::size), item = piece.first_channel / plan.channels_an_item;
    const int64_t slot = item * plan.slot_rows() * slots;
    body(Block{start, plan.columns, rows, int(columns), slot + first * slots, slots});
    if (plan.spare > 0 && piece.segment == plan.segments - 1) {
      body(Block{plan.rows * plan.columns, 0, 1, int(plan.spare), slot + plan.rows * slots, slots});
    }
  }

  int64_t count(const Piece& piece) const {
    int64_t elements = 0;
    each_block(piece, [&](const Block& block) { elements += block.rows * block.columns; });
    return elements / piece.channels;
  }

  // body(what packs of the block need of their channels), made of `values`, one a channel.
  template <class V, int Count, class Body>
  void for_packs(const Block& block, const Piece& piece, const V* const (&values)[Count], const Body& body) const {
    if (plan.columns_a_channel >= P::size) return body(PerChannel<T, V, Count>(values, int(plan.columns_a_channel)));
    alignas(64) V expanded[Count][width];
    PerColumn<T, V, Count> arrays;
    for (int i = 0; i < Count; ++i) {
      arrays.of[i] = values[i];
      if (block.in_order(piece.channels)) continue;
      block.expand(values[i], piece.channels, plan.columns_a_channel, expanded[i]);
      arrays.of[i] = expanded[i];
    }
    body(arrays);
  }

  // Adds to a and b, one value a channel, the sums of the terms that f makes of the elements of a block.
  template <class F>
  void sum_terms(const Block& block, const Piece& piece, const E* pivot, const A* const (&for_z)[3], double* a,
                 double* b, const F& f) const {
    const int64_t a_channel = plan.columns_a_channel;
    if (a_channel >= P::size && block.rows <= Block::few_rows) {
      return block.sum_maps(a_channel, {{pivot}, int(a_channel)}, {for_z, int(a_channel)}, a, b, f);
    }
    const auto sum = [&](const auto& pivots, const auto& z) {
      alignas(64) E s[width], q[width];
      for (int64_t row = 0; row < block.rows; row += most_rows) {
        const size_t bytes = size_t(block.packs()) * P::size * sizeof(E);
        memset(s, 0, bytes), memset(q, 0, bytes);
        block.accumulate(row, smaller(row + most_rows, block.rows), pivots, z, s, q, f);
        block.collect(s, piece.channels, plan.columns_a_channel, a);
        block.collect(q, piece.channels, plan.columns_a_channel, b);
      }
    };
    const auto with_z = [&](const auto& pivots) {
      if constexpr (F::needs_z) {
        for_packs(block, piece, for_z, [&](const auto& z) {
          using Z = std::decay_t<decltype(z)>;
          // Both are of one kind: nothing else is to be compiled.
          constexpr bool alike = Z::may_be_narrow == std::decay_t<decltype(pivots)>::may_be_narrow;
          if constexpr (alike || !F::shifted) sum(pivots, z);
        });
      } else {
        sum(pivots, PerColumn<T, A, 3>{});
      }
    };
    if constexpr (F::shifted) {
      for_packs(block, piece, {pivot}, with_z);
    } else {
      with_z(PerColumn<T, E, 1>{});
    }
  }

  // From some of the values of each channel that the first rows of a piece hold.
  void guess(const T* x, const Piece& piece, E* pivot) const {
    double sum[max_columns] = {};
    const int64_t a_channel = plan.columns_a_channel, C = piece.channels;
    const int64_t first = piece.segment * plan.segment_rows;
    const int64_t rows = smaller(plan.segment_rows, plan.rows - first);
    const int64_t taken = a_channel == 1 ? smaller(rows, samples) : 1, a_row = a_channel == 1 ? 1 : samples;
    for (int64_t i = 0; i < taken; ++i) {
      const T* row = x + (first + i * (rows / taken)) * plan.columns + piece.first_channel * a_channel;
      for (int64_t k = 0; k < a_row; ++k) {
        const T* at = row + k * 37 % a_channel;
        for (int64_t c = 0; c < C; ++c) sum[c] += double(to_acc(at[c * a_channel]));
      }
    }
    for (int64_t c = 0; c < C; ++c) pivot[c] = pivot_near<T>(sum[c] / double(taken * a_row));
  }

  // True: it made pivots better. `lost`: some squares are not finite.
  template <class Terms>
  bool moments(const Terms& terms, const Piece& piece, E* pivot, double* mean, double* m2, bool& lost) const {
    const double n = double(count(piece));
    double sum[max_columns], squares[max_columns];
    memset(sum, 0, piece.channels * sizeof(double));
    memset(squares, 0, piece.channels * sizeof(double));
    each_block(piece, [&](const Block& block) { sum_terms(block, piece, pivot, {}, sum, squares, terms); });
    // Two loops, because nearly always there is nothing to do in the second, and the first has no branches.
    int64_t bad = 0;
    for (int64_t k = 0; k < piece.channels; ++k) {
      const Moments m = from_shifted_sums(n, double(pivot[k]), sum[k], squares[k]);
      mean[k] = m.mean, m2[k] = m.m2;
      bad += !pivot_was_good(n, sum[k], m, pivot_allowed<T>) || !__builtin_isfinite(m.m2);
    }
    bool better = lost = false;
    for (int64_t k = 0; bad != 0 && k < piece.channels; ++k) {
      better |= improve_pivot<T>(n, sum[k], {n, mean[k], m2[k]}, pivot[k]);
      lost |= !__builtin_isfinite(m2[k]);
    }
    return better;
  }

  void stats(const T* x, const Piece& piece, double* mean, double* m2) const {
    E pivot[max_columns];
    wide_sums<T> ? void(memset(pivot, 0, piece.channels * sizeof(E))) : guess(x, piece, pivot);
    bool lost;
    if (moments(FirstDeviations<T>{x}, piece, pivot, mean, m2, lost)) {
      moments(Deviations<T, true>{x}, piece, pivot, mean, m2, lost);
    }
    if (sizeof(E) == 4 && lost) exact(x, piece, mean, m2);
  }

  // body(channel of the piece, value), in the order of memory.
  template <class Body>
  void each_value(const T* x, const Piece& piece, const Body& body) const {
    const int64_t a_channel = plan.columns_a_channel, width = piece.channels * a_channel;
    each_block(piece, [&](const Block& block) {
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t first = 0; first < block.columns; first += width) {
          const T* at = x + block.start + row * block.stride + first;
          for (int64_t k = 0; k < piece.channels; ++k) {
            for (int64_t i = 0; i < a_channel; ++i) body(k, double(to_acc(*at++)));
          }
        }
      }
    });
  }

  // Of the channels whose squares do not fit in a float, or are not finite: plainly, in double.
  void exact(const T* x, const Piece& piece, double* mean, double* m2) const {
    const double n = double(count(piece));
    double centre[max_columns] = {}, squares[max_columns] = {};
    each_value(x, piece, [&](int64_t k, double v) { centre[k] += v; });
    for (int64_t k = 0; k < piece.channels; ++k) centre[k] /= n;
    each_value(x, piece, [&](int64_t k, double v) { squares[k] += (v - centre[k]) * (v - centre[k]); });
    for (int64_t k = 0; k < piece.channels; ++k) {
      if (!__builtin_isfinite(m2[k])) mean[k] = centre[k], m2[k] = squares[k];
    }
  }

  template <class Source>
  void grad_stats(const T* x, const Source& source, const Piece& piece, const double* mean, const double* variance,
                  const A* const (&for_z)[3], double* sum, double* dot) const {
    E pivot[max_columns];
    bool shifted = false;
    for (int64_t k = 0; k < piece.channels; ++k) {
      sum[k] = dot[k] = 0;
      pivot[k] = gradient_pivot<T>(mean[k], variance[k]);
      shifted |= pivot[k] != 0;
    }
    each_block(piece, [&](const Block& block) {
      shifted ? sum_terms(block, piece, pivot, for_z, sum, dot, GradTerms<T, Source, true>{x, source})
              : sum_terms(block, piece, pivot, for_z, sum, dot, PlainGradTerms<T, Source>{x, source});
    });
    for (int64_t k = 0; k < piece.channels; ++k) dot[k] = about_mean(dot[k], sum[k], mean[k], double(pivot[k]));
  }

  template <class F>
  void map(T* out, const Piece& piece, MemoryUse memory, const A* const (&coefficients)[F::count], const F& f) const {
    each_block(piece, [&](const Block& block) {
      for_packs(block, piece, coefficients, [&](const auto& c) { block.map(out, c, memory, f); });
    });
  }
};
