// The output from given statistics: the second launch of the streaming forward pass, and the only one in eval.
#include "channel.cuh"
#include "epilogue.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

constexpr int loads_at_once = 4;  // per thread, over all tensors

template <class T, class Access, int V, class Epilogue>
__global__ void __launch_bounds__(streaming_threads, 3)
    normalize(const __grid_constant__ Geometry g, const __grid_constant__ Forward args) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  // Blocks run backwards to reuse what the reduction left in L2.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t channel_tile = block / g.batch_splits;
  const unsigned split = block % g.batch_splits;
  const T* const x = static_cast<const T*>(args.input);
  T* const y = static_cast<T*>(args.output);
  Access access(g, channel_tile, split);
  const Tile tile = access.tile();
  const Scratch<A> scratch{shared, g};
  if (const int c = int(threadIdx.x); c < tile.channels) {
    const int64_t channel = tile.first_channel + c;
    const double mean = args.training ? args.moments[channel] : read(args.mean, channel, 0);
    const double variance = args.training ? args.moments[args.problem.shape.C + channel] : read(args.var, channel, 1);
    if (!args.training && split == 0) write_moments(args, channel, mean, variance);
    set_normalization(args, channel, mean, variance, scratch, c);
  }
  __syncthreads();
  A z[3][Access::slots];  // mean, scale, shift
  load_coefficients(access, scratch, z);

  constexpr int at_once = Epilogue::with_residual ? loads_at_once / 2 : loads_at_once;
  const Epilogue epilogue{args};
  access.start();
  while (access.more()) {
    Raw<T, V> raw[at_once];
    typename Epilogue::Extra extra[at_once];
    for_each_span<at_once>(
        access,
        [&](int u, const VectorSpan& p) {
          raw[u] = load_span<T, V>(x, p, true);
          extra[u] = epilogue.load_extra(p);
        },
        [&](int u, const VectorSpan& p) {
          A value[V];
          widen<T, V>(raw[u], value);
          if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
          normalize_elements<Access::slots>(value, z);
          epilogue.apply(p, extra[u], value);
          store_span<T, V>(y, p, narrow<T, V>(value));
        });
  }
}

}  // namespace

void launch_normalize(const Plan& plan, const Forward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto access, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(access)::type;
    constexpr int V = decltype(vector)::value;
    dispatch_epilogue<T, V>(args.epilogue, [&](auto epilogue) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             normalize<T, W, V, typename decltype(epilogue)::type>, geometry_of(plan, args.problem.dtype), args);
    });
  });
}

}  // namespace fastbn::cuda
