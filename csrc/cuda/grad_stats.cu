// In: the gradient of the output, the input, its moments. Out: the gradients of weight and bias, and for grad_apply the
// sums behind them. In eval that of the input too, in the same reading: there it needs no sums.
#include "../core/activation.h"
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

constexpr int at_once = 2;  // loads in flight of a thread, of each tensor
constexpr int loads_a_sum = 16;

// summing, scaling: which of the two an eval pass was asked for; a training pass sums.
template <class T, class Walk, int V, class Act>
__global__ void __launch_bounds__(threads_a_block, 2)
    grad_stats(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, Sums* sums,
               unsigned* counters, bool summing, bool scaling, Act act) {
  using A = acc_t<T>;
  using S = sum_t<T, Walk::slots>;
  FASTBN_DYNAMIC_SHARED(shared);
  const int64_t item = blockIdx.x / g.blocks_an_item;
  const unsigned rank = blockIdx.x % g.blocks_an_item;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  Walk walk(g, item, rank);
  const Share share = walk.share();
  const Scratch<A> scratch{shared, g};
  const int c = int(threadIdx.x);
  if (c < share.channels) set_input_gradient(args, share.first_channel + c, Sums{0, 0}, scratch, c);
  __syncthreads();
  A z[3][Walk::slots];  // mean, x_scale, scale
  take(walk, scratch, z);

  ThreadSums<T, Walk::slots, true> thread_sums;
  walk.start();
  while (walk.more()) {
#pragma unroll 1
    for (int k = 0; k < loads_a_sum && walk.more(); k += at_once) {
      Raw<T, V> raw_dy[at_once], raw_x[at_once];
      Piece piece[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        piece[u] = {0, 0, 0};
        raw_x[u] = {};
        if (!walk.more()) continue;
        piece[u] = walk.piece();
        raw_dy[u] = load_piece<T, V>(dy, piece[u]);
        if (summing) raw_x[u] = load_piece<T, V>(x, piece[u]);
        walk.next();
      }
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (piece[u].first >= piece[u].last) continue;
        A gradient[V], value[V];
        widen<T, V>(raw_dy[u], gradient);
        widen<T, V>(raw_x[u], value);
        each_element<V, Walk::slots>(piece[u], [&](int j, int slot) {
          const A dz = act.backward(gradient[j], [&] { return value[j]; });
          thread_sums.add(slot, S(dz), S(value[j]) - S(z[0][slot]));
          gradient[j] = dz * z[2][slot];
        });
        if (scaling) store_piece<T, V>(dx, piece[u], narrow<T, V>(gradient));
      }
    }
    thread_sums.flush();
  }
  if (!summing) return;

  block_sums(walk, thread_sums.firsts(), thread_sums.seconds(), scratch);
  if (g.blocks_an_item > 1) {
    Sums* const packets = static_cast<Sums*>(args.workspace) + item * g.blocks_an_item * g.channels_an_item;
    if (c < share.channels) packets[rank * g.channels_an_item + c] = scratch.template packet<Sums>(c);
    if (!is_last_block(counters + item, g.blocks_an_item)) return;
    merge_packets<OfSums>(packets, g, share.channels, scratch);
  }
  if (c < share.channels) {
    const Sums done = corrected<A>(args, share.first_channel + c, scratch.template packet<Sums>(c));
    finish_sums(args, share.first_channel + c, done);
    if (sums != nullptr) sums[share.first_channel + c] = done;
  }
}

}  // namespace

void launch_grad_stats(const Plan& plan, const Backward& args, const Stream& stream) {
  const bool wants_sums = args.grad_weight.data != nullptr || args.grad_bias.data != nullptr;
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
           grad_stats<T, W, decltype(vector)::value, Identity>, geometry_of(plan), args, sums_of(plan, args),
           tickets(stream), args.training || wants_sums, !args.training && args.grad_input != nullptr, Identity{});
  });
}

}  // namespace fastbn::cuda
