// In: the input and its statistics, of the batch or given. Out: the output. The second half of the streaming forward
// pass, and all of it in eval.
#include "../core/activation.h"
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

constexpr int at_once = 4;  // loads in flight of a thread

template <class T, class Walk, int V, class Act>
__global__ void __launch_bounds__(threads_a_block, 3)
    apply(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, Act act) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  // Backwards, so that what the statistics read last, and is still in the cache, is read first.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t item = block / g.blocks_an_item;
  const unsigned rank = block % g.blocks_an_item;
  const T* const x = static_cast<const T*>(args.input);
  T* const y = static_cast<T*>(args.output);
  Walk walk(g, item, rank);
  const Share share = walk.share();
  const Scratch<A> scratch{shared, g};
  if (const int c = int(threadIdx.x); c < share.channels) {
    const int64_t channel = share.first_channel + c;
    const double mean = args.training ? args.moments[channel] : read(args.mean, channel, 0);
    const double variance = args.training ? args.moments[args.problem.shape.C + channel] : read(args.var, channel, 1);
    if (!args.training && rank == 0) finish_moments(args, channel, mean, variance);
    set_normalization(args, channel, mean, variance, scratch, c);
  }
  __syncthreads();
  A z[3][Walk::slots];  // mean, scale, shift
  take(walk, scratch, z);

  walk.start();
  while (walk.more()) {
    Raw<T, V> raw[at_once];
    Piece piece[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      piece[u] = {0, 0, 0};
      if (!walk.more()) continue;
      piece[u] = walk.piece();
      raw[u] = load_piece<T, V>(x, piece[u], true);
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      if (piece[u].first >= piece[u].last) continue;
      A value[V];
      widen<T, V>(raw[u], value);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int slot = Walk::slots == 1 ? 0 : j;
        value[j] = act.forward((value[j] - z[0][slot]) * z[1][slot] + z[2][slot]);
      }
      store_piece<T, V>(y, piece[u], narrow<T, V>(value));
    }
  }
}

}  // namespace

void launch_apply(const Plan& plan, const Forward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
           apply<T, W, decltype(vector)::value, Identity>, geometry_of(plan), args, Identity{});
  });
}

}  // namespace fastbn::cuda
