// The gradients of weight and bias, and the sums that backward_elemt needs: the first launch of the streaming backward
// pass. In eval it also writes the gradient of the input, which needs no sums there.
#include "backward_epilogue.cuh"
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight per thread and tensor.
template <class Access, class Epilogue>
constexpr int loads_at_once = reloads_coefficients<Access, Epilogue> ? 1 : 2;
constexpr int loads_per_sum = 16;

// summing, scaling: which of the two results an eval pass needs; training needs the sums.
template <class T, class Access, int V, class Epilogue>
__global__ void __launch_bounds__(streaming_threads, 2)
    backward_reduce(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, Sums* sums,
                    unsigned* tickets, bool summing, bool scaling) {
  using A = acc_t<T>;
  using S = sum_t<T, Access::slots>;
  FASTBN_DYNAMIC_SHARED(shared);
  const int64_t channel_tile = blockIdx.x / g.batch_splits;
  const unsigned split = blockIdx.x % g.batch_splits;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  Access access(g, channel_tile, split);
  const Tile tile = access.tile();
  const Scratch<A> scratch{shared, g};
  const int c = int(threadIdx.x);
  if (c < tile.channels) set_normalization(args, tile.first_channel + c, scratch, c);
  __syncthreads();
  A z[3][Access::slots];  // mean, scale, shift
  load_coefficients(access, scratch, z);

  constexpr int at_once = loads_at_once<Access, Epilogue>;
  const Epilogue epilogue{args};
  const bool reading = summing || epilogue.needs_input();
  ThreadSums<T, Access::slots, true> thread_sums;
  access.start();
  while (access.more()) {
#pragma unroll 1
    for (int k = 0; k < loads_per_sum && access.more(); k += at_once) {
      Raw<T, V> raw_dy[at_once], raw_x[at_once];
      typename Epilogue::Extra extra[at_once];
      for_each_span<at_once>(
          access,
          [&](int u, const VectorSpan& p) {
            raw_dy[u] = load_span<T, V>(dy, p, Epilogue::masked);
            raw_x[u] = reading ? load_span<T, V>(x, p) : Raw<T, V>{};
            extra[u] = epilogue.load_extra(p);
          },
          [&](int u, const VectorSpan& p) {
            A dz[V], value[V];
            widen<T, V>(raw_x[u], value);
            if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
            const auto z_of = [&](int j) {
              const int slot = Access::slots == 1 ? 0 : j;
              return normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
            };
            const Raw<T, V> raw_dz = epilogue.apply(extra[u], raw_dy[u], z_of, dz);
            if (scaling) epilogue.store_residual_grad(p, raw_dz);
            if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
            each_element<V, Access::slots>(p, [&](int j, int slot) {
              thread_sums.add(slot, S(dz[j]), S(value[j]) - S(z[0][slot]));
              dz[j] *= z[1][slot];
            });
            if (scaling) store_span<T, V>(dx, p, narrow<T, V>(dz));
          });
    }
    thread_sums.flush();
  }
  if (!summing) return;

  const Meeting meeting = tile_meeting(g, channel_tile, split, tickets, shared);
  Record* const records = static_cast<Record*>(args.workspace) + channel_tile * meeting.size();
  block_sums(access, thread_sums.firsts(), thread_sums.seconds(), scratch, [&](int of, const Sums& s) {
    scratch.record(of) = {s.first, s.second};
    if (g.batch_splits > 1) meeting.publish(records, of, {s.first, s.second});
  });
  __syncthreads();
  const auto finish = [&](int of, const Record& r) {
    const int64_t channel = tile.first_channel + of;
    const Sums done = corrected<A>(args.moments[channel], r);
    write_param_grads(args, channel, args.moments[args.problem.shape.C + channel], done);
    if (sums != nullptr) sums[channel] = done;
  };
  if (g.batch_splits > 1) {
    meeting.template merge_in_last<OfSums>(access, records, tile.channels, finish);
  } else if (c < tile.channels) {
    finish(c, scratch.record(c));
  }
}

}  // namespace

void launch_backward_reduce(const Plan& plan, const Backward& args, const Stream& stream) {
  const bool wants_sums = args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;
  dispatch(plan, args.problem.dtype, [&](auto type, auto access, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(access)::type;
    constexpr int V = decltype(vector)::value;
    dispatch_backward_epilogue<T, V>(args, [&](auto epilogue) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             backward_reduce<T, W, V, typename decltype(epilogue)::type>, geometry_of(plan, args.problem.dtype), args,
             sums_of(plan, args), stream.tickets, args.training || wants_sums,
             !args.training && args.grad_input != nullptr);
    });
  });
}

}  // namespace fastbn::cuda
