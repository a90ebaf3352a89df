// In: the gradient of the output, the input, the sums that grad_stats left. Out: the gradient of the input. The second
// half of the streaming backward pass in training.
#include "../core/activation.h"
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

constexpr int at_once = 2;  // loads in flight of a thread, of each tensor

template <class T, class Walk, int V, class Act>
__global__ void __launch_bounds__(threads_a_block, 3)
    grad_apply(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, const Sums* sums, Act act) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  // Backwards, so that what grad_stats read last, and is still in the cache, is read first.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t item = block / g.blocks_an_item;
  const unsigned rank = block % g.blocks_an_item;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  Walk walk(g, item, rank);
  const Share share = walk.share();
  const Scratch<A> scratch{shared, g};
  if (const int c = int(threadIdx.x); c < share.channels) {
    set_input_gradient(args, share.first_channel + c, sums[share.first_channel + c], scratch, c);
  }
  __syncthreads();
  A z[4][Walk::slots];  // mean, x_scale, scale, shift
  take(walk, scratch, z);

  walk.start();
  while (walk.more()) {
    Raw<T, V> raw_dy[at_once], raw_x[at_once];
    Piece piece[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      piece[u] = {0, 0, 0};
      if (!walk.more()) continue;
      piece[u] = walk.piece();
      raw_dy[u] = load_piece<T, V>(dy, piece[u], true);
      raw_x[u] = load_piece<T, V>(x, piece[u], true);
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      if (piece[u].first >= piece[u].last) continue;
      A gradient[V], value[V];
      widen<T, V>(raw_dy[u], gradient);
      widen<T, V>(raw_x[u], value);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int slot = Walk::slots == 1 ? 0 : j;
        const A dz = act.backward(gradient[j], [&] { return value[j]; });
        gradient[j] = (dz + (value[j] - z[0][slot]) * z[1][slot]) * z[2][slot] + z[3][slot];
      }
      store_piece<T, V>(dx, piece[u], narrow<T, V>(gradient));
    }
  }
}

}  // namespace

void launch_grad_apply(const Plan& plan, const Backward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
           grad_apply<T, W, decltype(vector)::value, Identity>, geometry_of(plan), args, sums_of(plan, args),
           Identity{});
  });
}

}  // namespace fastbn::cuda
