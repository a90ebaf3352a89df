// The passes of batch norm on the CPU: the order in which reductions and element-wise loops run over the tiles of a
// plan. Compiled once per instruction set; the including file sets FASTBN_CAPABILITY and FASTBN_VECTOR_BYTES.

#define FASTBN_INLINE __attribute__((always_inline))
#define FASTBN_NOINLINE __attribute__((noinline))

namespace fastbn::cpu::FASTBN_CAPABILITY {

// clang-format off: each is made of those before it
#include "simd/vec.h"
#include "simd/math.h"
#include "../core/activation.h"
#include "epilogue.h"
#include "reduce_ops.h"
#include "columns.h"
#include "rows.h"
#include "access.h"
// clang-format on

// Arrays in the workspace: coefficients of every channel, then the partial sums of every batch split.
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

// Per-channel values are computed in blocks of kChannelBlock so that the loops vectorize; calls body(first, number).
constexpr int64_t kChannelBlock = 64;

template <class Body>
FASTBN_HD void for_each_channel_block(int64_t first, int64_t end, const Body& body) {
  for (int64_t c = first; c < end; c += kChannelBlock) body(c, smaller(kChannelBlock, end - c));
}

FASTBN_NOINLINE void read_block(const Param& p, int64_t first, int64_t number, double otherwise, double* values) {
  if (p.data == nullptr) {
    for (int64_t i = 0; i < number; ++i) values[i] = otherwise;
    return;
  }
  dispatch_dtype(p.dtype, [&](auto t) {
    const auto* const data = static_cast<const typename decltype(t)::type*>(p.data) + first;
    for (int64_t i = 0; i < number; ++i) values[i] = double(to_acc(data[i]));
  });
}

FASTBN_NOINLINE void write_block(const Output& p, int64_t first, int64_t number, const double* values) {
  if (p.data == nullptr) return;
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T* const data = static_cast<T*>(p.data) + first;
    for (int64_t i = 0; i < number; ++i) data[i] = from_acc<T>(acc_t<T>(values[i]));
  });
}

// `update` (core/dispatch.h) of a block of channels; counter and batches are used on GPUs only.
FASTBN_NOINLINE void update_running_block(const Running& running, int64_t first, int64_t number, const double* mean,
                                          const double* variance, double count) {
  if (running.mean.data == nullptr) return;
  const double momentum = running.momentum, unbiased = count / (count - 1);
  const auto blend = [&](const Output& p, const double* batch, double factor) FASTBN_INLINE {
    double values[kChannelBlock];
    read_block({p.data, p.dtype}, first, number, 0, values);
    for (int64_t i = 0; i < number; ++i) values[i] = (1 - momentum) * values[i] + momentum * (batch[i] * factor);
    write_block(p, first, number, values);
  };
  blend(running.mean, mean, 1);
  blend(running.var, variance, unbiased);
}

// `normalization` (core/formula.h) of a block of channels.
template <class A>
FASTBN_NOINLINE void normalization_block(const double* mean, const double* variance, double eps, const Param& weight,
                                         const Param& bias, int64_t first, int64_t number, A* means, A* scales,
                                         A* shifts) {
  double w[kChannelBlock], b[kChannelBlock];
  read_block(weight, first, number, 1, w);
  read_block(bias, first, number, 0, b);
  for (int64_t i = 0; i < number; ++i) {
    const auto z = normalization<A>(mean[i], variance[i], eps, w[i], b[i]);
    means[i] = z.mean, scales[i] = z.scale, shifts[i] = z.shift;
  }
}

template <class T, class Access>
struct Pass {
  using A = acc_t<T>;
  const Shape& shape;
  const Plan plan;
  const int64_t C = shape.C;
  const int64_t tensors;
  const bool unread;  // the loop that writes is the first one to read the inputs
  const Access access;

  // `tensors`: how many the pass reads or writes. `summed`: the inputs are reduced before the outputs are written;
  // `elsewhere`: they were reduced by an earlier pass.
  Pass(const Plan& plan, const Problem& problem, int64_t tensors, bool summed, bool elsewhere)
      : shape(problem.shape),
        plan(summed ? plan : in_parts(plan, problem, thread_count())),
        tensors(tensors),
        unread(!summed && !elsewhere),
        access{this->plan, shape, bytes() * problem.parts >= cached_bytes(unread)} {}

  int64_t bytes() const { return shape.elements() * int64_t(sizeof(T)) * tensors; }
  // Cache use of the loop that writes; `both`: the second output may use streaming stores.
  MemoryUse memory_use(bool both) const { return {both, unread, 0}; }

  // Adds the distance to the channel tile that is `tiles_ahead`.
  MemoryUse before(MemoryUse memory, int64_t tiles_ahead) const {
    const bool known = plan.channel_tiles > 1 && (memory.unread || tiles_ahead > 0);
    memory.next = known ? tiles_ahead * plan.tile_width() : 0;
    return memory;
  }

  Tile tile(int64_t channel_tile, int64_t split) const {
    const int64_t first = channel_tile * plan.channels_per_tile;
    return {first, smaller(plan.channels_per_tile, C - first), split};
  }

  // Runs first(tile) (partial sums), finalize(tile) (channel results and coefficients) and second(tile, tiles ahead)
  // (outputs) for all tiles. A channel tile with one batch split goes through all three while it is in cache. Otherwise
  // the outputs run backwards, each thread through its own tiles, to reuse what its cache still holds.
  template <class First, class Finalize, class Second>
  void run(bool reduce, const First& first, const Finalize& finalize, const Second& second) const {
    const int64_t bytes = this->bytes(), tiles = plan.channel_tiles * plan.batch_splits;
    if (plan.batch_splits == 1) {
      // Without a reduction the outputs also run backwards: what was read or written last is in cache.
      const Order order = reduce ? Order::forwards : Order::backwards;
      const auto whole = [&](int64_t channel_tile) {
        const Tile p = tile(channel_tile, 0);
        if (reduce) first(p);
        finalize(p);
        second(p, reduce ? 1 : -1);
      };
      return parallel_for(plan.channel_tiles, bytes, whole, order);
    }
    const auto nth = [&](int64_t i) { return tile(i % plan.channel_tiles, i / plan.channel_tiles); };
    if (reduce) parallel_for(tiles, bytes, [&](int64_t i) { first(nth(i)); });
    constexpr int64_t share = 128;  // channels per task of finalize
    const auto part = [&](int64_t i) { return Tile{i * share, smaller(share, C - i * share), 0}; };
    parallel_for(ceil_div(C, share), bytes, [&](int64_t i) { finalize(part(i)); });
    parallel_for(tiles, bytes, [&](int64_t i) { second(nth(i), reduce ? 0 : -1); }, Order::backwards);
  }
};

template <class T, class Access>
void forward(const Plan& plan, const Forward& args) {
  using A = acc_t<T>;
  const int64_t tensors = args.epilogue.residual == nullptr ? 2 : 3;
  const Pass<T, Access> pass(plan, args.problem, tensors, args.training, args.precomputed_stats);
  const int64_t C = pass.C;
  const Workspace<A> work(args.workspace, C);
  const T* x = static_cast<const T*>(args.input);
  T* y = static_cast<T*>(args.output);
  const MemoryUse memory = pass.memory_use(false);
  const double count = double(args.problem.shape.per_channel());

  const auto stats = [&](const Tile& p) {
    const int64_t at = p.split * 2 * C + p.first_channel;
    pass.access.stats(x, p, work.partial[0] + at, work.partial[1] + at);
  };
  const auto merge_splits = [&](const Tile& p) {
    const int64_t end = p.first_channel + p.channels;
    double* const mean = args.moments;
    double* const variance = args.moments + C;
    // Chan's formula for all batch splits at once, about the mean of the first one if that is finite; loops over
    // channels without branches.
    const auto for_each_split = [&](const auto& body) FASTBN_INLINE {
      for (int64_t k = 0; k < pass.plan.batch_splits; ++k) {
        const double here = double(pass.access.count(pass.tile(0, k)));
        const double *const m = work.partial[0] + k * 2 * C, *const m2 = work.partial[1] + k * 2 * C;
        for (int64_t c = p.first_channel; c < end; ++c) body(c, here, m[c], m2[c]);
      }
    };
    const double* const first = work.partial[0];
    const auto about = [=](int64_t c) FASTBN_INLINE { return __builtin_isfinite(first[c]) ? first[c] : 0; };
    for (int64_t c = p.first_channel; c < end; ++c) mean[c] = variance[c] = 0;
    for_each_split([=](int64_t c, double here, double m, double) FASTBN_INLINE { mean[c] += here * (m - about(c)); });
    for (int64_t c = p.first_channel; c < end; ++c) mean[c] = about(c) + mean[c] / count;
    for_each_split([=](int64_t c, double here, double m, double m2)
                       FASTBN_INLINE { variance[c] += m2 + here * (m - mean[c]) * (m - mean[c]); });
    for (int64_t c = p.first_channel; c < end; ++c) variance[c] /= count;
  };
  const auto finalize = [&](const Tile& p) {
    const int64_t end = p.first_channel + p.channels;
    if (args.training) merge_splits(p);
    for_each_channel_block(p.first_channel, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double given[2][kChannelBlock];
      const double *mean = given[0], *variance = given[1];
      if (args.training) {
        mean = args.moments + c, variance = args.moments + C + c;
      } else {
        read_block(args.mean, c, number, 0, given[0]);
        read_block(args.var, c, number, 1, given[1]);
      }
      normalization_block<A>(mean, variance, args.eps, args.weight, args.bias, c, number, work.coefficient[0] + c,
                             work.coefficient[1] + c, work.coefficient[2] + c);
      if (args.training) {
        update_running_block(args.running, c, number, mean, variance, count);
      } else if (args.moments != nullptr) {
        for (int64_t i = 0; i < number; ++i) {
          args.moments[c + i] = mean[i], args.moments[C + c + i] = variance[i];
        }
      }
    });
  };
  const auto normalize = [&](const Tile& p, int64_t tiles_ahead) {
    if (y == nullptr) return;
    const int64_t c = p.first_channel;
    dispatch_epilogue<T>(args, [&](const auto& epilogue) {
      const NormalizeOp<T, std::decay_t<decltype(epilogue)>> f{x, epilogue};
      pass.access.map(y, p, pass.before(memory, tiles_ahead),
                      {work.coefficient[0] + c, work.coefficient[1] + c, work.coefficient[2] + c}, f);
    });
  };
  pass.run(args.training, stats, finalize, normalize);
}

template <class T, class Access>
void backward(const Plan& plan, const Backward& args) {
  using A = acc_t<T>;
  const bool global_sums = args.global_sums != nullptr;
  const bool reduce =
      !global_sums && (args.training || args.grad_weight.data != nullptr || args.grad_bias.data != nullptr);
  T* dz = static_cast<T*>(args.grad_residual);
  const int64_t tensors = dz == nullptr || dz == args.grad_output ? 3 : 4;
  const Pass<T, Access> pass(plan, args.problem, tensors, reduce, global_sums);
  const int64_t C = pass.C;
  const Workspace<A> work(args.workspace, C);
  const T* x = static_cast<const T*>(args.input);
  T* dx = static_cast<T*>(args.grad_input);
  // Streaming stores for both gradients: up to 19 % faster, but 5-40 % slower if dz overwrites dy, and if a vector is
  // not a whole cache line; NOTES.md#epilogue.
  const bool both = vector_bytes == 64 && dz != nullptr && dz != args.grad_output &&
                    (reinterpret_cast<uintptr_t>(dz) - reinterpret_cast<uintptr_t>(dx)) % vector_bytes == 0;
  const MemoryUse memory = pass.memory_use(both);
  const double* const mean = args.moments;
  const double* const variance = args.moments + C;
  const double n = double(args.problem.shape.per_channel());

  const auto backward_reduce = [&](const Tile& p) {
    const int64_t first = p.first_channel;
    const int64_t at = p.split * 2 * C + first;
    dispatch_backward_epilogue<T>(args, [&](const auto& epilogue) {
      using Epilogue = std::decay_t<decltype(epilogue)>;
      A z[3][Epilogue::needs_z ? padded_channels(max_columns) : 1];
      if constexpr (Epilogue::needs_z) {
        for_each_channel_block(0, p.channels, [&](int64_t k, int64_t number) FASTBN_INLINE {
          const int64_t c = first + k;
          normalization_block<A>(mean + c, variance + c, args.eps, args.weight, args.bias, c, number, z[0] + k,
                                 z[1] + k, z[2] + k);
        });
      }
      pass.access.backward_reduce(x, epilogue, p, mean + first, variance + first, {z[0], z[1], z[2]},
                                  work.partial[0] + at, work.partial[1] + at);
    });
  };
  double* const sums = work.partial[0];  // merged in place of the first split
  double* const dots = work.partial[1];
  const auto merge_splits = [&](const Tile& p) {
    const int64_t first = p.first_channel, end = first + p.channels;
    for (int64_t k = 1; k < pass.plan.batch_splits; ++k) {
      for (int64_t c = first; c < end; ++c) sums[c] += sums[k * 2 * C + c];
      for (int64_t c = first; c < end; ++c) dots[c] += dots[k * 2 * C + c];
    }
    for_each_channel_block(first, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double grad_weight[kChannelBlock];
      for (int64_t i = 0; i < number; ++i) {
        grad_weight[i] = dots[c + i] * reciprocal_std(variance[c + i], args.eps);
      }
      write_block(args.grad_weight, c, number, grad_weight);
      write_block(args.grad_bias, c, number, sums + c);
    });
  };
  const auto finalize = [&](const Tile& p) {
    const int64_t first = p.first_channel, end = first + p.channels;
    if (reduce) merge_splits(p);
    for_each_channel_block(first, end, [&](int64_t c, int64_t number) FASTBN_INLINE {
      double total[2][kChannelBlock], count[kChannelBlock],
          weight[kChannelBlock];  // of dy and dy * (x - mean)
      for (int64_t i = 0; i < number; ++i) count[i] = args.global_counts != nullptr ? args.global_counts[c + i] : n;
      if (global_sums) {
        for (int64_t i = 0; i < number; ++i) {
          total[0][i] = args.global_sums[C + c + i];
          total[1][i] = args.global_sums[c + i] / reciprocal_std(variance[c + i], args.eps);
        }
      } else {
        for (int64_t i = 0; i < number; ++i) {
          total[0][i] = reduce ? sums[c + i] : 0, total[1][i] = reduce ? dots[c + i] : 0;
        }
      }
      read_block(args.weight, c, number, 1, weight);
      A* coefficient[coefficients];
      for (int k = 0; k < coefficients; ++k) coefficient[k] = work.coefficient[k] + c;
      for (int64_t i = 0; i < number; ++i) {
        const auto g =
            input_gradient<A>(mean[c + i], variance[c + i], args.eps, weight[i], count[i], total[0][i], total[1][i]);
        coefficient[0][i] = g.mean, coefficient[1][i] = g.x_scale;
        coefficient[2][i] = g.scale, coefficient[3][i] = g.shift;
      }
      if (args.epilogue.activation == Activation::identity) return;
      double bias[kChannelBlock];
      read_block(args.bias, c, number, 0, bias);
      for (int64_t i = 0; i < number; ++i) {
        coefficient[4][i] = normalization<A>(mean[c + i], variance[c + i], args.eps, weight[i], bias[i]).shift;
      }
    });
  };
  const auto backward_elemt = [&](const Tile& p, int64_t tiles_ahead) {
    if (dx == nullptr) return;
    const MemoryUse use = pass.before(memory, tiles_ahead);
    const int64_t c = p.first_channel;
    A* coefficient[coefficients];
    for (int i = 0; i < coefficients; ++i) coefficient[i] = work.coefficient[i] + c;
    const auto [m, x_scale, scale, shift, z_shift] = coefficient;
    dispatch_backward_epilogue<T>(args, [&](const auto& epilogue) {
      using Epilogue = std::decay_t<decltype(epilogue)>;
      if (args.training) {
        const BackwardElemtOp<T, Epilogue> f{x, dz, epilogue};
        if constexpr (Epilogue::needs_z) {
          pass.access.map(dx, p, use, {m, x_scale, scale, shift, z_shift}, f);
        } else {
          pass.access.map(dx, p, use, {m, x_scale, scale, shift}, f);
        }
      } else {
        const BackwardScaleOp<T, Epilogue> f{x, dz, epilogue};
        if constexpr (Epilogue::needs_z) {
          pass.access.map(dx, p, use, {scale, m, z_shift}, f);
        } else {
          pass.access.map(dx, p, use, {scale}, f);
        }
      }
    });
  };
  pass.run(reduce, backward_reduce, finalize, backward_elemt);
}

void run_forward(const Plan& plan, const Forward& args) {
  dispatch_dtype(args.problem.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool rows = plan.pattern == AccessPattern::rows;
    rows ? forward<T, RowAccess<T>>(plan, args) : forward<T, ColumnAccess<T>>(plan, args);
  });
}

void run_backward(const Plan& plan, const Backward& args) {
  dispatch_dtype(args.problem.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool rows = plan.pattern == AccessPattern::rows;
    rows ? backward<T, RowAccess<T>>(plan, args) : backward<T, ColumnAccess<T>>(plan, args);
  });
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
