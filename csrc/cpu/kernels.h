// In: Forward and Backward. Out: outputs, moments, running statistics, gradients: the order in which the primitives
// run. Compiled once per instruction set; the file that includes it sets FASTBN_CAPABILITY and FASTBN_VECTOR_BYTES.

#define FASTBN_INLINE __attribute__((always_inline))
#define FASTBN_NOINLINE __attribute__((noinline))

namespace fastbn::cpu::FASTBN_CAPABILITY {

// clang-format off: each is made of those before it
#include "vec.h"
#include "vecmath.h"
#include "../core/activation.h"
#include "epilogue.h"
#include "terms.h"
#include "columns.h"
#include "runs.h"
#include "walks.h"
// clang-format on

// Arrays in the workspace: coefficients of every channel, then the partial results of every segment.
template <class A>
struct Workspace {
  A* coefficient[coefficients];
  double* partial[2];
  Workspace(void* memory, int64_t channels) {
    const int64_t padded = padded_channels(channels);
    for (int i = 0; i < coefficients; ++i) coefficient[i] = static_cast<A*>(memory) + i * padded;
    partial[0] = reinterpret_cast<double*>(coefficient[coefficients - 1] + padded);
    partial[1] = partial[0] + channels;
  }
};

// Numbers of so many channels are made together, a vector at a time; body(first, number) for each of them in turn.
constexpr int64_t some = 64;

template <class Body>
FASTBN_HD void each_some(int64_t first, int64_t end, const Body& body) {
  for (int64_t c = first; c < end; c += some) body(c, smaller(some, end - c));
}

FASTBN_NOINLINE void read_some(const Param& p, int64_t first, int64_t number, double otherwise, double* values) {
  if (p.data == nullptr) {
    for (int64_t i = 0; i < number; ++i) values[i] = otherwise;
    return;
  }
  dispatch_dtype(p.dtype, [&](auto t) {
    const auto* const data = static_cast<const typename decltype(t)::type*>(p.data) + first;
    for (int64_t i = 0; i < number; ++i) values[i] = double(to_acc(data[i]));
  });
}

FASTBN_NOINLINE void write_some(const Output& p, int64_t first, int64_t number, const double* values) {
  if (p.data == nullptr) return;
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T* const data = static_cast<T*>(p.data) + first;
    for (int64_t i = 0; i < number; ++i) data[i] = from_acc<T>(acc_t<T>(values[i]));
  });
}

// As `update` (core/dispatch.h) of each; a counter and the batches are read on GPUs alone.
FASTBN_NOINLINE void update_some(const Running& running, int64_t first, int64_t number, const double* mean,
                                 const double* variance, double count) {
  if (running.mean.data == nullptr) return;
  const double momentum = running.momentum, unbiased = count / (count - 1);
  const auto blend = [&](const Output& p, const double* batch, double factor) FASTBN_INLINE {
    double values[some];
    read_some({p.data, p.dtype}, first, number, 0, values);
    for (int64_t i = 0; i < number; ++i) values[i] = (1 - momentum) * values[i] + momentum * (batch[i] * factor);
    write_some(p, first, number, values);
  };
  blend(running.mean, mean, 1);
  blend(running.var, variance, unbiased);
}

// normalization (core/formula.h) of each.
template <class A>
FASTBN_NOINLINE void normalize_some(const double* mean, const double* variance, double eps, const Param& weight,
                                    const Param& bias, int64_t first, int64_t number, A* means, A* scales, A* shifts) {
  double w[some], b[some];
  read_some(weight, first, number, 1, w);
  read_some(bias, first, number, 0, b);
  for (int64_t i = 0; i < number; ++i) {
    const auto z = normalization<A>(mean[i], variance[i], eps, w[i], b[i]);
    means[i] = z.mean, scales[i] = z.scale, shifts[i] = z.shift;
  }
}

template <class T, class Walk>
struct Pass {
  using A = acc_t<T>;
  const Shape& shape;
  const Plan plan;
  const Walk walk{plan, shape};
  const int64_t C = shape.C;
  const int64_t all_parts;

  // `summed`: with a pass that reads for sums before the one that writes.
  Pass(const Problem& problem, bool summed)
      : shape(problem.shape),
        plan(summed ? make_plan(problem) : in_parts(make_plan(problem), problem, thread_count())),
        all_parts(problem.parts) {}

  int64_t bytes(int64_t tensors) const { return shape.elements() * int64_t(sizeof(T)) * tensors; }

  // Of the pass that writes, in which `tensors` are read or written; `summed`: behind one that reads; `elsewhere`: that
  // was a pass of its own; `both`: a second output may go past the cache.
  MemoryUse memory_use(int64_t tensors, bool summed, bool elsewhere, bool both) const {
    const bool unread = !summed && !elsewhere;
    return {bytes(tensors) * all_parts >= cached_bytes(unread), both, unread, 0};
  }

  // Where the item so many items on is read next.
  MemoryUse before(MemoryUse memory, int64_t items) const {
    const bool known = plan.items > 1 && (memory.unread || items > 0);
    memory.next = known ? items * plan.item_width() : 0;
    return memory;
  }

  Piece piece(int64_t item, int64_t segment) const {
    const int64_t first = item * plan.channels_an_item;
    return {first, smaller(plan.channels_an_item, C - first), segment};
  }

  // Runs first(item, segment) for all pieces, then finish(item), second(item, segment, items from it to the one that is
  // read next): sums of a piece, those of the item, and the output. An item of one segment goes through all of them
  // while it is in the cache; otherwise the second pass goes backwards, each thread through its own pieces, from what
  // its cache still holds.
  template <class First, class Finish, class Second>
  void run(int64_t tensors, bool reduce, const First& first, const Finish& finish, const Second& second) const {
    const int64_t bytes = this->bytes(tensors), pieces = plan.items * plan.segments;
    if (plan.segments == 1) {
      // Alone, the second pass goes backwards too: what was read or written last is in the cache.
      const Order order = reduce ? Order::forwards : Order::backwards;
      const auto whole = [&](int64_t item) {
        const Piece p = piece(item, 0);
        if (reduce) first(p);
        finish(p);
        second(p, reduce ? 1 : -1);
      };
      return parallel_for(plan.items, bytes, whole, order);
    }
    const auto nth = [&](int64_t i) { return piece(i % plan.items, i / plan.items); };
    if (reduce) parallel_for(pieces, bytes, [&](int64_t i) { first(nth(i)); });
    constexpr int64_t share = 128;  // channels, for each thread to finish
    const auto part = [&](int64_t i) { return Piece{i * share, smaller(share, C - i * share), 0}; };
    parallel_for(ceil_div(C, share), bytes, [&](int64_t i) { finish(part(i)); });
    parallel_for(pieces, bytes, [&](int64_t i) { second(nth(i), reduce ? 0 : -1); }, Order::backwards);
  }
};

template <class T, class Walk>
void forward(const Forward& args) {
  using A = acc_t<T>;
  const Pass<T, Walk> pass(args.problem, args.training);
  const int64_t C = pass.C;
  const Workspace<A> work(args.workspace, C);
  const T* x = static_cast<const T*>(args.input);
  T* y = static_cast<T*>(args.output);
  const int64_t tensors = args.epilogue.residual == nullptr ? 2 : 3;
  const MemoryUse memory = pass.memory_use(tensors, args.training, args.spread, false);
  const double count = double(args.problem.shape.per_channel());

  const auto stats = [&](const Piece& p) {
    const int64_t at = p.segment * 2 * C + p.first_channel;
    pass.walk.stats(x, p, work.partial[0] + at, work.partial[1] + at);
  };
  const auto merge_segments = [&](const Piece& p) {
    const int64_t end = p.first_channel + p.channels;
    double* const mean = args.moments;
    double* const variance = args.moments + C;
    // Chan's formula for all segments at once, about the mean of the first, if it is finite: loops over channels
    // without branches.
    const auto each_segment = [&](const auto& body) FASTBN_INLINE {
      for (int64_t k = 0; k < pass.plan.segments; ++k) {
        const double here = double(pass.walk.count(pass.piece(0, k)));
        const double *const m = work.partial[0] + k * 2 * C, *const m2 = work.partial[1] + k * 2 * C;
        for (int64_t c = p.first_channel; c < end; ++c) body(c, here, m[c], m2[c]);
      }
    };
    const double* const first = work.partial[0];
    const auto about = [=](int64_t c) FASTBN_INLINE { return __builtin_isfinite(first[c]) ? first[c] : 0; };
    for (int64_t c = p.first_channel; c < end; ++c) mean[c] = variance[c] = 0;
    each_segment([=](int64_t c, double here, double m, double) FASTBN_INLINE { mean[c] += here * (m - about(c)); });
    for (int64_t c = p.first_channel; c < end; ++c) mean[c] = about(c) + mean[c] / count;
    each_segment([=](int64_t c, double here, double m, double m2)
                     FASTBN_INLINE { variance[c] += m2 + here * (m - mean[c]) * (m - mean[c]); });
    for (int64_t c = p.first_channel; c < end; ++c) variance[c] /= count;
  };
  const auto finish = [&](const Piece& p) {
    const int64_t end = p.first_channel + p.channels;
    if (args.training) merge_segments(p);
    each_some(p.first_channel, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double given[2][some];
      const double *mean = given[0], *variance = given[1];
      if (args.training) {
        mean = args.moments + c, variance = args.moments + C + c;
      } else {
        read_some(args.mean, c, number, 0, given[0]);
        read_some(args.var, c, number, 1, given[1]);
      }
      normalize_some<A>(mean, variance, args.eps, args.weight, args.bias, c, number, work.coefficient[0] + c,
                        work.coefficient[1] + c, work.coefficient[2] + c);
      if (args.training) {
        update_some(args.running, c, number, mean, variance, count);
      } else if (args.moments != nullptr) {
        for (int64_t i = 0; i < number; ++i) {
          args.moments[c + i] = mean[i], args.moments[C + c + i] = variance[i];
        }
      }
    });
  };
  const auto apply = [&](const Piece& p, int64_t items) {
    if (y == nullptr) return;
    const int64_t c = p.first_channel;
    with_end<T>(args, [&](const auto& end) {
      const Apply<T, std::decay_t<decltype(end)>> f{x, end};
      pass.walk.map(y, p, pass.before(memory, items),
                    {work.coefficient[0] + c, work.coefficient[1] + c, work.coefficient[2] + c}, f);
    });
  };
  pass.run(tensors, args.training, stats, finish, apply);
}

template <class T, class Walk>
void backward(const Backward& args) {
  using A = acc_t<T>;
  const bool spread = args.total != nullptr;
  const bool reduce = !spread && (args.training || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr);
  const Pass<T, Walk> pass(args.problem, reduce);
  const int64_t C = pass.C;
  const Workspace<A> work(args.workspace, C);
  const T* x = static_cast<const T*>(args.input);
  T* dx = static_cast<T*>(args.grad_input);
  T* dz = static_cast<T*>(args.grad_residual);
  // The residual's gradient beside the input's: 0.81 to 1 of the time, but 1.05 to 1.4 in the place of what is read;
  // two streams of half lines in turns took 1.1 to 1.6.
  const bool both = vector_bytes == 64 && dz != nullptr && dz != args.grad_output &&
                    (reinterpret_cast<uintptr_t>(dz) - reinterpret_cast<uintptr_t>(dx)) % vector_bytes == 0;
  const int64_t tensors = dz == nullptr || dz == args.grad_output ? 3 : 4;
  const MemoryUse memory = pass.memory_use(tensors, reduce, spread, both);
  const double* const mean = args.moments;
  const double* const variance = args.moments + C;
  const double n = double(args.problem.shape.per_channel());

  const auto grad_stats = [&](const Piece& p) {
    const int64_t first = p.first_channel;
    const int64_t at = p.segment * 2 * C + first;
    with_source<T>(args, [&](const auto& source) {
      using Source = std::decay_t<decltype(source)>;
      A z[3][Source::needs_z ? padded_channels(max_columns) : 1];
      if constexpr (Source::needs_z) {
        each_some(0, p.channels, [&](int64_t k, int64_t number) FASTBN_INLINE {
          const int64_t c = first + k;
          normalize_some<A>(mean + c, variance + c, args.eps, args.weight, args.bias, c, number, z[0] + k, z[1] + k,
                            z[2] + k);
        });
      }
      pass.walk.grad_stats(x, source, p, mean + first, variance + first, {z[0], z[1], z[2]}, work.partial[0] + at,
                           work.partial[1] + at);
    });
  };
  double* const sums = work.partial[0];  // of all segments, in the place of the first
  double* const dots = work.partial[1];
  const auto merge_segments = [&](const Piece& p) {
    const int64_t first = p.first_channel, end = first + p.channels;
    for (int64_t k = 1; k < pass.plan.segments; ++k) {
      for (int64_t c = first; c < end; ++c) sums[c] += sums[k * 2 * C + c];
      for (int64_t c = first; c < end; ++c) dots[c] += dots[k * 2 * C + c];
    }
    each_some(first, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double grad_weight[some];
      for (int64_t i = 0; i < number; ++i) {
        grad_weight[i] = dots[c + i] * reciprocal_std(variance[c + i], args.eps);
      }
      write_some(args.grad_weight, c, number, grad_weight);
      write_some(args.grad_bias, c, number, sums + c);
    });
  };
  const auto finish = [&](const Piece& p) {
    const int64_t first = p.first_channel, end = first + p.channels;
    if (reduce) merge_segments(p);
    each_some(first, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double total[2][some], count[some], weight[some];  // sums of dy, and of dy * (x - mean)
      for (int64_t i = 0; i < number; ++i) count[i] = args.counts != nullptr ? args.counts[c + i] : n;
      if (spread) {
        for (int64_t i = 0; i < number; ++i) {
          total[0][i] = args.total[C + c + i];
          total[1][i] = args.total[c + i] / reciprocal_std(variance[c + i], args.eps);
        }
      } else {
        for (int64_t i = 0; i < number; ++i) {
          total[0][i] = reduce ? sums[c + i] : 0, total[1][i] = reduce ? dots[c + i] : 0;
        }
      }
      read_some(args.weight, c, number, 1, weight);
      A* coefficient[coefficients];
      for (int k = 0; k < coefficients; ++k) coefficient[k] = work.coefficient[k] + c;
      for (int64_t i = 0; i < number; ++i) {
        const auto g =
            input_gradient<A>(mean[c + i], variance[c + i], args.eps, weight[i], count[i], total[0][i], total[1][i]);
        coefficient[0][i] = g.mean, coefficient[1][i] = g.x_scale;
        coefficient[2][i] = g.scale, coefficient[3][i] = g.shift;
      }
      if (args.epilogue.activation == Activation::identity) return;
      double bias[some];
      read_some(args.bias, c, number, 0, bias);
      for (int64_t i = 0; i < number; ++i) {
        coefficient[4][i] = normalization<A>(mean[c + i], variance[c + i], args.eps, weight[i], bias[i]).shift;
      }
    });
  };
  const auto grad_apply = [&](const Piece& p, int64_t items) {
    if (dx == nullptr) return;
    const MemoryUse use = pass.before(memory, items);
    const int64_t c = p.first_channel;
    A* coefficient[coefficients];
    for (int i = 0; i < coefficients; ++i) coefficient[i] = work.coefficient[i] + c;
    const auto [m, x_scale, scale, shift, z_shift] = coefficient;
    with_source<T>(args, [&](const auto& source) {
      using Source = std::decay_t<decltype(source)>;
      if (args.training) {
        const GradApply<T, Source> f{x, dz, source};
        if constexpr (Source::needs_z) {
          pass.walk.map(dx, p, use, {m, x_scale, scale, shift, z_shift}, f);
        } else {
          pass.walk.map(dx, p, use, {m, x_scale, scale, shift}, f);
        }
      } else {
        const ScaleOnly<T, Source> f{x, dz, source};
        if constexpr (Source::needs_z) {
          pass.walk.map(dx, p, use, {scale, m, z_shift}, f);
        } else {
          pass.walk.map(dx, p, use, {scale}, f);
        }
      }
    });
  };
  pass.run(tensors, reduce, grad_stats, finish, grad_apply);
}

void run_forward(const Forward& args) {
  dispatch_dtype(args.problem.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool runs = make_plan(args.problem).walk == Walk::runs;
    runs ? forward<T, RunsWalk<T>>(args) : forward<T, ColumnsWalk<T>>(args);
  });
}

void run_backward(const Backward& args) {
  dispatch_dtype(args.problem.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool runs = make_plan(args.problem).walk == Walk::runs;
    runs ? backward<T, RunsWalk<T>>(args) : backward<T, ColumnsWalk<T>>(args);
  });
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
