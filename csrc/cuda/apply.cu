// In: the input and its statistics, of the batch or given. Out: the output. The second half of the streaming forward
// pass, and all of it in eval.
#include "channel.cuh"
#include "ending.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

constexpr int loads_at_once = 4;  // of a thread, of all tensors

template <class T, class Walk, int V, class Ending>
__global__ void __launch_bounds__(threads_a_block, 3)
    apply(const __grid_constant__ Geometry g, const __grid_constant__ Forward args) {
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

  constexpr int at_once = Ending::with_residual ? loads_at_once / 2 : loads_at_once;
  const Ending ending{args};
  walk.start();
  while (walk.more()) {
    Raw<T, V> raw[at_once];
    typename Ending::Beside beside[at_once];
    take_pieces<at_once>(
        walk,
        [&](int u, const Piece& p) {
          raw[u] = load_piece<T, V>(x, p, true);
          beside[u] = ending.load_beside(p);
        },
        [&](int u, const Piece& p) {
          A value[V];
          widen<T, V>(raw[u], value);
          if constexpr (takes_anew<Walk, Ending>) take(walk, scratch, z);
          normalize<Walk::slots>(value, z);
          ending.finish(p, beside[u], value);
          store_piece<T, V>(y, p, narrow<T, V>(value));
        });
  }
}

}  // namespace

void launch_apply(const Plan& plan, const Forward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    constexpr int V = decltype(vector)::value;
    dispatch_ending<T, V>(args.epilogue, [&](auto ending) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             apply<T, W, V, typename decltype(ending)::type>, geometry_of(plan), args);
    });
  });
}

}  // namespace fastbn::cuda
