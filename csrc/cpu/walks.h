// In: a plan, an item of channels and a segment of the batch. Out: the four primitives on that piece:
// stats, apply, grad_stats, grad_apply. One struct for each walk, with the same members.

// Values of one channel that are looked at to guess its mean before it is summed.
constexpr int64_t samples = 8;

struct Piece {
  int64_t first_channel, channels;
  int64_t segment;
};

// What is wrong with a guess shows in the sums. True: read the piece once more with the better pivot.
template <class T>
FASTBN_HD bool improve_pivot(double n, double sum, const Moments& m, sum_t<T>& pivot) {
  // In standard deviations: 2 leave float sums 0.2 of their precision, 1000 leave double sums of floats plenty.
  constexpr double allowed = sizeof(sum_t<T>) == sizeof(acc_t<T>) ? 2.0 * 2.0 : 1e3 * 1e3;
  if (pivot_was_good(n, sum, m, allowed)) return false;
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
  const Plan& plan;
  const Shape& shape;

  // body(offset, length) for every run of the piece's k-th channel; backwards what was read last comes first.
  template <class Body>
  FASTBN_HD void each_run(const Piece& piece, int64_t k, bool backwards, const Body& body) const {
    const int64_t parts = ceil_div(shape.S, plan.segment_positions);
    const int64_t n0 = piece.segment / parts * plan.segment_samples;
    const int64_t n1 = smaller(shape.N, n0 + plan.segment_samples);
    const int64_t s0 = piece.segment % parts * plan.segment_positions;
    const int64_t length = smaller(plan.segment_positions, shape.S - s0);
    const int64_t base = (piece.first_channel + k) * shape.S + s0;
    for (int64_t i = n0; i < n1; ++i) {
      const int64_t n = backwards ? n0 + n1 - 1 - i : i;
      body(base + n * shape.C * shape.S, length);
    }
  }

  int64_t count(const Piece& piece) const {
    int64_t n = 0;
    each_run(piece, 0, false, [&](int64_t, int64_t length) { n += length; });
    return n;
  }

  E guess(const T* x, const Piece& piece, int64_t k) const {
    int64_t runs = 0;
    each_run(piece, k, false, [&](int64_t, int64_t) { ++runs; });
    const int64_t apart = ceil_div(runs, samples);
    double sum = 0;
    int64_t run = 0, n = 0;
    each_run(piece, k, false, [&](int64_t offset, int64_t length) {
      if (run++ % apart != 0) return;
      sum += double(to_acc(x[offset + run * 37 % length]));
      sum += double(to_acc(x[offset + (run * 37 + length / 2) % length]));
      n += 2;
    });
    return pivot_near<T>(sum / double(n));
  }

  template <class Terms>
  PairOfSums<T, Terms> sums(const Piece& piece, int64_t k, const Terms& terms) const {
    PairOfSums<T, Terms> result(terms);
    each_run(piece, k, false, [&](int64_t offset, int64_t length) { result.run(offset, length); });
    result.flush();
    return result;
  }

  void stats(const T* x, const Piece& piece, double* mean, double* m2) const {
    const double n = double(count(piece));
    for (int64_t k = 0; k < piece.channels; ++k) {
      E pivot = guess(x, piece, k);
      Moments m{};
      for (int round = 0, again = true; again && round < 2; ++round) {
        const auto s = sums(piece, k, [x, p = broadcast(pivot)](int64_t i, L& a, L& b) FASTBN_INLINE {
          a = lanes_of<E>(P::load(x + i));
          for (auto& v : a.v) v -= p;
          b = a;
        });
        m = from_shifted_sums(n, double(pivot), s.first, s.second);
        again = improve_pivot<T>(n, s.first, m, pivot);
      }
      mean[k] = m.mean, m2[k] = m.m2;
      if (sizeof(E) == 4 && !__builtin_isfinite(m.m2)) exact(x, piece, k, n, mean[k], m2[k]);
    }
  }

  // Values too large for their squares to fit in a float, or not finite: plainly, in double.
  void exact(const T* x, const Piece& piece, int64_t k, double n, double& mean, double& m2) const {
    double sum = 0;
    m2 = 0;
    each_run(piece, k, false, [&](int64_t offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i) sum += double(to_acc(x[offset + i]));
    });
    mean = sum / n;
    each_run(piece, k, false, [&](int64_t offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i) {
        const double d = double(to_acc(x[offset + i])) - mean;
        m2 += d * d;
      }
    });
  }

  void grad_stats(const T* dy, const T* x, const Piece& piece, const double* mean, const double* variance, double* sum,
                  double* dot) const {
    for (int64_t k = 0; k < piece.channels; ++k) {
      const E pivot = gradient_pivot<T>(mean[k], variance[k]);
      const auto s = sums(piece, k, [dy, x, p = broadcast(pivot)](int64_t i, L& a, L& b) FASTBN_INLINE {
        a = lanes_of<E>(P::load(dy + i)), b = lanes_of<E>(P::load(x + i));
        for (auto& v : b.v) v -= p;
      });
      sum[k] = s.first, dot[k] = about_mean(s.second, s.first, mean[k], double(pivot));
    }
  }

  // make(offset) gives the f of map_run for the run at offset.
  template <class Make>
  void map(T* out, const Piece& piece, int64_t k, bool streamed, const Make& make) const {
    each_run(piece, k, true, [&](int64_t offset, int64_t length) {
      if (streamed) {
        map_run<true>(out + offset, length, make(offset));
      } else {
        map_run<false>(out + offset, length, make(offset));
      }
    });
  }

  void apply(const T* x, T* y, const Piece& piece, bool streamed, const A* mean, const A* scale, const A* shift) const {
    for (int64_t k = piece.channels - 1; k >= 0; --k) {
      const Vec<A> m = broadcast(mean[k]), g = broadcast(scale[k]), b = broadcast(shift[k]);
      map(y, piece, k, streamed, [=](int64_t offset) {
        return [=, in = x + offset](int64_t i) FASTBN_INLINE {
          P v = P::load(in + i);
          for (auto& e : v.v) e = (e - m) * g + b;
          return v;
        };
      });
    }
  }

  void grad_apply(const T* dy, const T* x, T* dx, const Piece& piece, bool streamed, const A* mean, const A* x_scale,
                  const A* scale, const A* shift) const {
    for (int64_t k = piece.channels - 1; k >= 0; --k) {
      const Vec<A> m = broadcast(mean[k]), h = broadcast(x_scale[k]), g = broadcast(scale[k]), b = broadcast(shift[k]);
      map(dx, piece, k, streamed, [=](int64_t offset) {
        return [=, gradient = dy + offset, in = x + offset](int64_t i) FASTBN_INLINE {
          P v = P::load(gradient + i);
          const P d = P::load(in + i);
          for (int j = 0; j < P::vectors; ++j) v.v[j] = (v.v[j] + (d.v[j] - m) * h) * g + b;
          return v;
        };
      });
    }
  }

  void scale_only(const T* dy, T* dx, const Piece& piece, bool streamed, const A* scale) const {
    for (int64_t k = piece.channels - 1; k >= 0; --k) {
      const Vec<A> g = broadcast(scale[k]);
      map(dx, piece, k, streamed, [=](int64_t offset) {
        return [=, gradient = dy + offset](int64_t i) FASTBN_INLINE {
          P v = P::load(gradient + i);
          for (auto& e : v.v) e *= g;
          return v;
        };
      });
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
    body(Block{start, plan.columns, rows, int(columns)});
    if (plan.spare > 0 && piece.segment == plan.segments - 1) {
      body(Block{plan.rows * plan.columns, 0, 1, int(plan.spare)});
    }
  }

  int64_t count(const Piece& piece) const {
    int64_t elements = 0;
    each_block(piece, [&](const Block& block) { elements += block.rows * block.columns; });
    return elements / piece.channels;
  }

  // Adds to a and b, one value a channel, what f makes of the elements of a block.
  template <class F>
  void sum_terms(const Block& block, const Piece& piece, const E* per_channel, double* a, double* b, const F& f) const {
    alignas(64) E coefficients[width], s[width], q[width];
    block.expand(per_channel, piece.channels, plan.columns_a_channel, coefficients);
    for (int64_t row = 0; row < block.rows; row += most_rows) {
      const size_t bytes = size_t(block.packs()) * P::size * sizeof(E);
      memset(s, 0, bytes), memset(q, 0, bytes);
      block.accumulate(row, smaller(row + most_rows, block.rows), coefficients, s, q, f);
      block.collect(s, piece.channels, plan.columns_a_channel, a);
      block.collect(q, piece.channels, plan.columns_a_channel, b);
    }
  }

  void shifted_sums(const Block& block, const T* x, const Piece& piece, const E* pivot, double* sum,
                    double* squares) const {
    sum_terms(block, piece, pivot, sum, squares,
              [x](const auto& access, int64_t i, const S& c, S& s, S& q) FASTBN_INLINE {
                const S v = lanes_of<E>(access.load(x + i));
                for (int k = 0; k < S::vectors; ++k) {
                  const Vec<E> d = v.v[k] - c.v[k];
                  s.v[k] += d;
                  q.v[k] += d * d;
                }
              });
  }

  void guess(const T* x, const Piece& piece, E* pivot, double* sum, double* squares) const {
    memset(pivot, 0, piece.channels * sizeof(E));
    memset(sum, 0, piece.channels * sizeof(double));
    each_block(piece, [&](const Block& block) {
      if (block.stride == 0 && block.start != 0) return;  // the spare elements
      const int64_t a_row = larger<int64_t>(1, block.columns / piece.channels);
      Block sample = block;
      sample.rows = smaller(block.rows, ceil_div(samples, a_row));
      sample.stride = block.stride * (block.rows / sample.rows);
      shifted_sums(sample, x, piece, pivot, sum, squares);
      const double n = double(sample.rows * a_row);
      for (int64_t k = 0; k < piece.channels; ++k) pivot[k] = pivot_near<T>(sum[k] / n);
    });
  }

  void stats(const T* x, const Piece& piece, double* mean, double* m2) const {
    const double n = double(count(piece));
    E pivot[max_columns];
    double sum[max_columns], squares[max_columns];
    guess(x, piece, pivot, sum, squares);
    for (int round = 0; round < 2; ++round) {
      memset(sum, 0, piece.channels * sizeof(double));
      memset(squares, 0, piece.channels * sizeof(double));
      each_block(piece, [&](const Block& block) { shifted_sums(block, x, piece, pivot, sum, squares); });
      bool again = false;
      for (int64_t k = 0; k < piece.channels; ++k) {
        const Moments m = from_shifted_sums(n, double(pivot[k]), sum[k], squares[k]);
        mean[k] = m.mean, m2[k] = m.m2;
        again |= improve_pivot<T>(n, sum[k], m, pivot[k]);
      }
      if (!again) break;
    }
    for (int64_t k = 0; k < piece.channels; ++k) {
      if (sizeof(E) == 4 && !__builtin_isfinite(m2[k])) exact(x, piece, k, n, mean[k], m2[k]);
    }
  }

  template <class Body>
  void each_value(const T* x, const Piece& piece, int64_t channel, const Body& body) const {
    each_block(piece, [&](const Block& block) {
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t c = 0; c < block.columns; ++c) {
          if (c / plan.columns_a_channel % piece.channels == channel) {
            body(double(to_acc(x[block.start + row * block.stride + c])));
          }
        }
      }
    });
  }

  void exact(const T* x, const Piece& piece, int64_t k, double n, double& mean, double& m2) const {
    double sum = 0, squares = 0;
    each_value(x, piece, k, [&](double v) { sum += v; });
    const double centre = sum / n;
    each_value(x, piece, k, [&](double v) { squares += (v - centre) * (v - centre); });
    mean = centre, m2 = squares;
  }

  void grad_stats(const T* dy, const T* x, const Piece& piece, const double* mean, const double* variance, double* sum,
                  double* dot) const {
    E pivot[max_columns];
    for (int64_t k = 0; k < piece.channels; ++k) {
      sum[k] = dot[k] = 0;
      pivot[k] = gradient_pivot<T>(mean[k], variance[k]);
    }
    each_block(piece, [&](const Block& block) {
      sum_terms(block, piece, pivot, sum, dot,
                [dy, x](const auto& access, int64_t i, const S& c, S& s, S& q) FASTBN_INLINE {
                  const S g = lanes_of<E>(access.load(dy + i)), v = lanes_of<E>(access.load(x + i));
                  for (int k = 0; k < S::vectors; ++k) {
                    s.v[k] += g.v[k];
                    q.v[k] += g.v[k] * (v.v[k] - c.v[k]);
                  }
                });
    });
    for (int64_t k = 0; k < piece.channels; ++k) dot[k] = about_mean(dot[k], sum[k], mean[k], double(pivot[k]));
  }

  template <int Count, class F>
  void map(T* out, const Piece& piece, bool streamed, const A* const (&coefficients)[Count], const F& f) const {
    alignas(64) A expanded[Count][width];
    PerColumn<A, Count> arrays;
    for (int i = 0; i < Count; ++i) arrays.of[i] = expanded[i];
    each_block(piece, [&](const Block& block) {
      for (int i = 0; i < Count; ++i) {
        block.expand(coefficients[i], piece.channels, plan.columns_a_channel, expanded[i]);
      }
      block.map(out, arrays, streamed, f);
    });
  }

  void apply(const T* x, T* y, const Piece& piece, bool streamed, const A* mean, const A* scale, const A* shift) const {
    map<3>(y, piece, streamed, {mean, scale, shift}, [x](const auto& access, int64_t i, const L(&c)[3]) FASTBN_INLINE {
      P v = access.load(x + i);
      for (int k = 0; k < P::vectors; ++k) v.v[k] = (v.v[k] - c[0].v[k]) * c[1].v[k] + c[2].v[k];
      return v;
    });
  }

  void grad_apply(const T* dy, const T* x, T* dx, const Piece& piece, bool streamed, const A* mean, const A* x_scale,
                  const A* scale, const A* shift) const {
    map<4>(dx, piece, streamed, {mean, x_scale, scale, shift},
           [dy, x](const auto& access, int64_t i, const L(&c)[4]) FASTBN_INLINE {
             P v = access.load(dy + i);
             const P d = access.load(x + i);
             for (int k = 0; k < P::vectors; ++k) {
               v.v[k] = (v.v[k] + (d.v[k] - c[0].v[k]) * c[1].v[k]) * c[2].v[k] + c[3].v[k];
             }
             return v;
           });
  }

  void scale_only(const T* dy, T* dx, const Piece& piece, bool streamed, const A* scale) const {
    map<1>(dx, piece, streamed, {scale}, [dy](const auto& access, int64_t i, const L(&c)[1]) FASTBN_INLINE {
      P v = access.load(dy + i);
      for (int k = 0; k < P::vectors; ++k) v.v[k] *= c[0].v[k];
      return v;
    });
  }
};
