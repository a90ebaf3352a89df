// The passes over one tile (a channel tile of one batch split): stats and backward_reduce compute sums, map writes
// outputs. One struct for each access pattern, with the same members.

// Number of values of a channel that are averaged to choose its pivot.
constexpr int64_t kPivotProbes = 8;

struct Tile {
  int64_t first_channel, channels;
  int64_t split;
};

// Sets a better pivot if the sums show that this one was too far from the mean; true: reduce the tile again.
template <class T>
FASTBN_HD bool improve_pivot(double n, double sum, const Moments& m, sum_t<T>& pivot) {
  if (pivot_was_good(n, sum, m, pivot_allowed<T>)) return false;
  const sum_t<T> better = pivot_near<T>(m.mean);
  const bool differs = better != pivot;
  pivot = better;
  return differs;
}

// sum(dy * (x - mean)) from sum(dy * (x - pivot)).
FASTBN_HD double about_mean(double dot, double sum, double mean, double pivot) {
  return mean == pivot ? dot : dot - (mean - pivot) * sum;
}

template <class T>
struct RowAccess {
  using A = acc_t<T>;
  using E = sum_t<T>;
  using P = Pack<T>;
  using L = Lanes<T, E>;
  using C = Lanes<T, A>;
  const Plan& plan;
  const Shape& shape;
  const bool past_cache;  // see ColumnBlock

  // Calls body(row) for every row of the k-th channel of the tile; backwards, the row that was read last comes first.
  template <class Body>
  FASTBN_HD void for_each_row(const Tile& tile, int64_t k, bool backwards, const Body& body) const {
    const int64_t parts = plan.parts();
    const int64_t n0 = tile.split / parts * plan.split_samples;
    const int64_t n1 = smaller(shape.N, n0 + plan.split_samples);
    const int64_t part = tile.split % parts, s0 = part * plan.split_positions;
    const int64_t length = smaller(plan.split_positions, shape.S - s0);
    const int64_t channel = tile.first_channel + k, slots = plan.slots_per_row(P::size);
    for (int64_t i = n0; i < n1; ++i) {
      const int64_t n = backwards ? n0 + n1 - 1 - i : i;
      const int64_t map = n * shape.C + channel;
      const int64_t offset = map * shape.S + s0, apart = shape.C * shape.S * (backwards ? -1 : 1);
      body(Row{offset, length, (map * parts + part) * slots, i + 1 < n1 ? offset + apart : offset});
    }
  }

  int64_t count(const Tile& tile) const {
    int64_t n = 0;
    for_each_row(tile, 0, false, [&](const Row& row) { n += row.length; });
    return n;
  }

  E probe_pivot(const T* x, const Tile& tile, int64_t k) const {
    int64_t rows = 0;
    for_each_row(tile, k, false, [&](const Row&) { ++rows; });
    const int64_t apart = ceil_div(rows, kPivotProbes);
    double sum = 0;
    int64_t number = 0, n = 0;
    for_each_row(tile, k, false, [&](const Row& row) {
      if (number++ % apart != 0) return;
      sum += double(to_acc(x[row.offset + number * 37 % row.length]));
      sum += double(to_acc(x[row.offset + (number * 37 + row.length / 2) % row.length]));
      n += 2;
    });
    return pivot_near<T>(sum / double(n));
  }

  template <class Op>
  std::pair<double, double> sums(const Tile& tile, int64_t k, E pivot, const Op& op,
                                 const ForwardCoefficients<T>& z) const {
    RowReduction<T, Op> pair(op, L::all(pivot), z, past_cache);
    for_each_row(tile, k, false, [&](const Row& row) { pair.add(row); });
    pair.flush();
    return {total<double>(pair.first), total<double>(pair.second)};
  }

  void stats(const T* x, const Tile& tile, double* mean, double* m2) const {
    const double n = double(count(tile));
    for (int64_t k = 0; k < tile.channels; ++k) {
      E pivot = starts_at_zero<T> ? E(0) : probe_pivot(x, tile, k);
      Moments m{};
      const auto improved = [&](const auto& op) {
        const auto [sum, squares] = sums(tile, k, pivot, op, ForwardCoefficients<T>{});
        m = from_shifted_sums(n, double(pivot), sum, squares);
        return improve_pivot<T>(n, sum, m, pivot);
      };
      if (improved(FirstStatsOp<T>{x})) improved(StatsOp<T, true>{x});
      mean[k] = m.mean, m2[k] = m.m2;
      if (sizeof(E) == 4 && !__builtin_isfinite(m.m2)) exact(x, tile, k, n, mean[k], m2[k]);
    }
  }

  // Two passes in float64, for values whose squares overflow float32 or that are not finite.
  void exact(const T* x, const Tile& tile, int64_t k, double n, double& mean, double& m2) const {
    double sum = 0;
    m2 = 0;
    for_each_row(tile, k, false, [&](const Row& row) {
      for (int64_t i = 0; i < row.length; ++i) sum += double(to_acc(x[row.offset + i]));
    });
    mean = sum / n;
    for_each_row(tile, k, false, [&](const Row& row) {
      for (int64_t i = 0; i < row.length; ++i) {
        const double d = double(to_acc(x[row.offset + i])) - mean;
        m2 += d * d;
      }
    });
  }

  // forward_coefficients: mean, scale and shift of the forward pass for each channel of the tile, if the epilogue
  // recomputes z.
  template <class Epilogue>
  void backward_reduce(const T* x, const Epilogue& epilogue, const Tile& tile, const double* mean,
                       const double* variance, const A* const (&forward_coefficients)[3], double* sum,
                       double* dot) const {
    for (int64_t k = 0; k < tile.channels; ++k) {
      const E pivot = gradient_pivot<T>(mean[k], variance[k]);
      ForwardCoefficients<T> z{};
      if (Epilogue::needs_z)
        z = {C::all(forward_coefficients[0][k]), C::all(forward_coefficients[1][k]),
             C::all(forward_coefficients[2][k])};
      std::tie(sum[k], dot[k]) = pivot == 0
                                     ? sums(tile, k, pivot, UnshiftedBackwardReduceOp<T, Epilogue>{x, epilogue}, z)
                                     : sums(tile, k, pivot, BackwardReduceOp<T, Epilogue, true>{x, epilogue}, z);
      dot[k] = about_mean(dot[k], sum[k], mean[k], double(pivot));
    }
  }

  template <class F>
  void map(T* out, const Tile& tile, MemoryUse memory, const A* const (&coefficients)[F::count], const F& f) const {
    for (int64_t k = tile.channels - 1; k >= 0; --k) {
      C c[F::count];
      for (int i = 0; i < F::count; ++i) c[i] = C::all(coefficients[i][k]);
      const bool unread = memory.unread, past_cache = this->past_cache;
      const int64_t next = memory.next;
      // Captured by value: a store may alias whatever is reached through a reference.
      const auto of_row = [=](const Row& row) FASTBN_INLINE {
        return [=](const auto& io, int64_t i, auto& packs) FASTBN_INLINE {
          constexpr int number = std::extent_v<std::remove_reference_t<decltype(packs)>>;
          for (int p = 0; past_cache && p < number; ++p) {
            const int64_t then = ahead<T>(row, i + p * P::size);
            if (unread) f.prefetch(then);
            f.prefetch_extra(then);
            if (next != 0 && !unread) f.prefetch(row.offset + i + p * P::size + next);
          }
          f(io, Places<number>{row.offset + i, P::size, row.slot + slot_of<T>(i), 1}, c, packs);
        };
      };
      const auto alone = [&](const Row& row) {
        const bool in_order = reinterpret_cast<uintptr_t>(out + row.offset) % vector_bytes == 0;
        const bool streams = past_cache && (in_order || !f.uses_mask());
        map_row<T, F::calls>(WholePack<T>{streams, streams && memory.both}, out + row.offset, row.length, of_row(row));
      };
      const bool several = !F::calls && vector_bytes == 64 &&
                           (sizeof(T) == 2 ? past_cache || unread : past_cache && !unread && !memory.both);
      Row waiting[4];
      int number = 0;
      for_each_row(tile, k, true, [&](const Row& row) {
        const bool whole =
            reinterpret_cast<uintptr_t>(out + row.offset) % vector_bytes == 0 && row.length % P::size == 0;
        if (!several || !whole) return alone(row);
        waiting[number++] = row;
        if (number < 4) return;
        number = 0;
        map_four_rows(WholePack<T>{past_cache, past_cache && memory.both}, out, waiting, of_row);
      });
      for (int r = 0; r < number; ++r) alone(waiting[r]);
    }
  }
};

template <class T>
struct ColumnAccess {
  using A = acc_t<T>;
  using E = sum_t<T>;
  using P = Pack<T>;
  using L = Lanes<T, A>;
  using S = Lanes<T, E>;
  using Block = ColumnBlock<T>;
  const Plan& plan;
  const Shape& shape;
  const bool past_cache;  // see ColumnBlock

  // Rows that are accumulated before the sums are moved to float64 (which they may be in already).
  static constexpr int64_t most_rows = sizeof(E) == 8 ? 1 << 20 : float_terms;
  static constexpr int width = int(max_columns) + P::size;

  // A second block holds the elements that fill no whole row, if there are any.
  template <class Body>
  void each_block(const Tile& tile, const Body& body) const {
    const int64_t channel_width = plan.columns_per_channel;
    const int64_t first = tile.split * plan.split_rows;
    const int64_t rows = smaller(plan.split_rows, plan.rows - first);
    const int64_t columns = plan.columns == shape.C * channel_width
                                ? tile.channels * channel_width
                                : plan.columns;  // otherwise several rows were joined
    const int64_t start = first * plan.columns + tile.first_channel * channel_width;
    const int64_t slots = plan.slots_per_row(P::size), channel_tile = tile.first_channel / plan.channels_per_tile;
    const int64_t slot = channel_tile * plan.slot_rows() * slots;
    body(Block{start, plan.columns, rows, int(columns), slot + first * slots, slots, past_cache});
    if (plan.spare > 0 && tile.split == plan.batch_splits - 1) {
      body(Block{plan.rows * plan.columns, 0, 1, int(plan.spare), slot + plan.rows * slots, slots, past_cache});
    }
  }

  int64_t count(const Tile& tile) const {
    int64_t elements = 0;
    each_block(tile, [&](const Block& block) { elements += block.rows * block.columns; });
    return elements / tile.channels;
  }

  // Calls body with a provider of per-pack values, from arrays of one value per channel. `rare`: one kind of provider
  // is enough.
  template <bool rare, class V, int Count, class Body>
  void for_packs(const Block& block, const Tile& tile, const V* const (&values)[Count], const Body& body) const {
    if constexpr (!rare) {
      if (plan.columns_per_channel >= P::size)
        return body(PerChannel<T, V, Count>(values, int(plan.columns_per_channel)));
    }
    alignas(64) V expanded[Count][width];
    PerColumn<T, V, Count> arrays;
    for (int i = 0; i < Count; ++i) {
      arrays.of[i] = values[i];
      if (block.in_order(tile.channels)) continue;
      block.expand(values[i], tile.channels, plan.columns_per_channel, expanded[i]);
      arrays.of[i] = expanded[i];
    }
    body(arrays);
  }

  // Adds to a and b, one value per channel, the sums of the terms that f makes of a block.
  template <class F>
  void reduce_block(const Block& block, const Tile& tile, const E* pivot, const A* const (&forward_coefficients)[3],
                    double* a, double* b, const F& f) const {
    const int64_t channel_width = plan.columns_per_channel;
    constexpr bool rare = Block::template is_rare<F>;
    if constexpr (!rare) {
      if (channel_width >= P::size && block.rows <= Block::few_rows) {
        return block.sum_maps(channel_width, {{pivot}, int(channel_width)}, {forward_coefficients, int(channel_width)},
                              a, b, f);
      }
    }
    const auto sum = [&](const auto& pivots, const auto& z) {
      alignas(64) E s[width], q[width];
      for (int64_t row = 0; row < block.rows; row += most_rows) {
        const size_t bytes = size_t(block.packs()) * P::size * sizeof(E);
        memset(s, 0, bytes), memset(q, 0, bytes);
        block.accumulate(row, smaller(row + most_rows, block.rows), pivots, z, s, q, f);
        block.collect(s, tile.channels, plan.columns_per_channel, a);
        block.collect(q, tile.channels, plan.columns_per_channel, b);
      }
    };
    const auto with_z = [&](const auto& pivots) {
      if constexpr (F::needs_z) {
        for_packs<rare>(block, tile, forward_coefficients, [&](const auto& z) {
          using Z = std::decay_t<decltype(z)>;
          // Both have the same kind, so the other combinations need not be compiled.
          constexpr bool alike = Z::may_be_narrow == std::decay_t<decltype(pivots)>::may_be_narrow;
          if constexpr (alike || !F::shifted) sum(pivots, z);
        });
      } else {
        sum(pivots, PerColumn<T, A, 3>{});
      }
    };
    if constexpr (F::shifted) {
      for_packs<rare>(block, tile, {pivot}, with_z);
    } else {
      with_z(PerColumn<T, E, 1>{});
    }
  }

  // The average of a few values of each channel from the first rows of the tile.
  void probe_pivot(const T* x, const Tile& tile, E* pivot) const {
    double sum[max_columns] = {};
    const int64_t channel_width = plan.columns_per_channel, C = tile.channels;
    const int64_t first = tile.split * plan.split_rows;
    const int64_t rows = smaller(plan.split_rows, plan.rows - first);
    const int64_t taken = channel_width == 1 ? smaller(rows, kPivotProbes) : 1,
                  a_row = channel_width == 1 ? 1 : kPivotProbes;
    for (int64_t i = 0; i < taken; ++i) {
      const T* row = x + (first + i * (rows / taken)) * plan.columns + tile.first_channel * channel_width;
      for (int64_t k = 0; k < a_row; ++k) {
        const T* at = row + k * 37 % channel_width;
        for (int64_t c = 0; c < C; ++c) sum[c] += double(to_acc(at[c * channel_width]));
      }
    }
    for (int64_t c = 0; c < C; ++c) pivot[c] = pivot_near<T>(sum[c] / double(taken * a_row));
  }

  // Returns whether pivots were improved. `lost`: some sums of squares are not finite.
  template <class Op>
  bool moments(const Op& op, const Tile& tile, E* pivot, double* mean, double* m2, bool& lost) const {
    const double n = double(count(tile));
    double sum[max_columns], squares[max_columns];
    memset(sum, 0, tile.channels * sizeof(double));
    memset(squares, 0, tile.channels * sizeof(double));
    each_block(tile, [&](const Block& block) { reduce_block(block, tile, pivot, {}, sum, squares, op); });
    // Two loops, because the second one nearly always has nothing to do and the first one vectorizes.
    int64_t bad = 0;
    for (int64_t k = 0; k < tile.channels; ++k) {
      const Moments m = from_shifted_sums(n, double(pivot[k]), sum[k], squares[k]);
      mean[k] = m.mean, m2[k] = m.m2;
      bad += !pivot_was_good(n, sum[k], m, pivot_allowed<T>) || !__builtin_isfinite(m.m2);
    }
    bool better = lost = false;
    for (int64_t k = 0; bad != 0 && k < tile.channels; ++k) {
      better |= improve_pivot<T>(n, sum[k], {n, mean[k], m2[k]}, pivot[k]);
      lost |= !__builtin_isfinite(m2[k]);
    }
    return better;
  }

  void stats(const T* x, const Tile& tile, double* mean, double* m2) const {
    E pivot[max_columns];
    starts_at_zero<T> ? void(memset(pivot, 0, tile.channels * sizeof(E))) : probe_pivot(x, tile, pivot);
    bool lost;
    if (moments(FirstStatsOp<T>{x}, tile, pivot, mean, m2, lost)) {
      moments(StatsOp<T, true>{x}, tile, pivot, mean, m2, lost);
    }
    if (sizeof(E) == 4 && lost) exact(x, tile, mean, m2);
  }

  // Calls body(channel of the tile, value) in memory order.
  template <class Body>
  void each_value(const T* x, const Tile& tile, const Body& body) const {
    const int64_t channel_width = plan.columns_per_channel, width = tile.channels * channel_width;
    each_block(tile, [&](const Block& block) {
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t first = 0; first < block.columns; first += width) {
          const T* at = x + block.start + row * block.stride + first;
          for (int64_t k = 0; k < tile.channels; ++k) {
            for (int64_t i = 0; i < channel_width; ++i) body(k, double(to_acc(*at++)));
          }
        }
      }
    });
  }

  // Two passes in float64, for channels whose squares overflow float32 or that are not finite.
  void exact(const T* x, const Tile& tile, double* mean, double* m2) const {
    const double n = double(count(tile));
    double centre[max_columns] = {}, squares[max_columns] = {};
    each_value(x, tile, [&](int64_t k, double v) { centre[k] += v; });
    for (int64_t k = 0; k < tile.channels; ++k) centre[k] /= n;
    each_value(x, tile, [&](int64_t k, double v) { squares[k] += (v - centre[k]) * (v - centre[k]); });
    for (int64_t k = 0; k < tile.channels; ++k) {
      if (!__builtin_isfinite(m2[k])) mean[k] = centre[k], m2[k] = squares[k];
    }
  }

  template <class Epilogue>
  void backward_reduce(const T* x, const Epilogue& epilogue, const Tile& tile, const double* mean,
                       const double* variance, const A* const (&forward_coefficients)[3], double* sum,
                       double* dot) const {
    E pivot[max_columns];
    bool shifted = false;
    for (int64_t k = 0; k < tile.channels; ++k) {
      sum[k] = dot[k] = 0;
      pivot[k] = gradient_pivot<T>(mean[k], variance[k]);
      shifted |= pivot[k] != 0;
    }
    each_block(tile, [&](const Block& block) {
      shifted ? reduce_block(block, tile, pivot, forward_coefficients, sum, dot,
                             BackwardReduceOp<T, Epilogue, true>{x, epilogue})
              : reduce_block(block, tile, pivot, forward_coefficients, sum, dot,
                             UnshiftedBackwardReduceOp<T, Epilogue>{x, epilogue});
    });
    for (int64_t k = 0; k < tile.channels; ++k) dot[k] = about_mean(dot[k], sum[k], mean[k], double(pivot[k]));
  }

  template <class F>
  void map(T* out, const Tile& tile, MemoryUse memory, const A* const (&coefficients)[F::count], const F& f) const {
    each_block(tile, [&](const Block& block) {
      for_packs<false>(block, tile, coefficients, [&](const auto& c) { block.map(out, c, memory, f); });
    });
  }
};
