// The gradient of the input from the sums of backward_reduce, or from those of all ranks: the second launch of the
// streaming backward pass in training.
#include "backward_epilogue.cuh"
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight per thread and tensor.
template <class Access, class Epilogue>
constexpr int loads_at_once = reloads_coefficients<Access, Epilogue> ? 1 : 2;

template <class T, class Access, int V, class Epilogue>
__global__ void __launch_bounds__(streaming_threads, Epilogue::plain ? 3 : 2)
    backward_elemt(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, const Sums* sums) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  // Blocks run backwards to reuse what backward_reduce left in L2.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t channel_tile = block / g.batch_splits;
  const unsigned split = block % g.batch_splits;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  Access access(g, channel_tile, split);
  const Tile tile = access.tile();
  const Scratch<A> scratch{shared, g};
  const int c = int(threadIdx.x);
  A shift[Access::slots] = {};  // of z; its mean and scale are those of dx
  if constexpr (Epilogue::recomputes) {
    if (c < tile.channels) set_normalization(args, tile.first_channel + c, scratch, c);
    __syncthreads();
    access.each_slot([&](int slot, int channel) { shift[slot] = scratch.at(2, channel); });
    __syncthreads();
  }
  if (c < tile.channels) {
    const int64_t channel = tile.first_channel + c;
    const bool own = sums != nullptr;
    const double count = own ? double(args.problem.shape.per_channel()) : args.global_counts[channel];
    const LoadedParam weight(args.weight, channel);
    set_input_gradient(args.moments[channel], args.moments[args.problem.shape.C + channel], args.eps,
                       weight.value(args.weight, 1), own ? sums[channel] : total_sums(args, channel), count, scratch,
                       c);
  }
  __syncthreads();
  A z[4][Access::slots];  // mean, x_scale, scale, shift
  load_coefficients(access, scratch, z);

  constexpr int at_once = loads_at_once<Access, Epilogue>;
  const Epilogue epilogue{args};
  access.start();
  while (access.more()) {
    Raw<T, V> raw_dy[at_once], raw_x[at_once];
    typename Epilogue::Extra extra[at_once];
    for_each_span<at_once>(
        access,
        [&](int u, const VectorSpan& p) {
          raw_dy[u] = load_span<T, V>(dy, p, true);
          raw_x[u] = load_span<T, V>(x, p, true);
          extra[u] = epilogue.load_extra(p);
        },
        [&](int u, const VectorSpan& p) {
          A dz[V], value[V];
          widen<T, V>(raw_x[u], value);
          const auto z_of = [&](int j) {
            const int slot = Access::slots == 1 ? 0 : j;
            return normalized(value[j], z[0][slot], z[2][slot], shift[slot]);
          };
          epilogue.store_residual_grad(p, epilogue.apply(extra[u], raw_dy[u], z_of, dz));
          differentiate<Access::slots>(dz, value, z);
          store_span<T, V>(dx, p, narrow<T, V>(dz));
        });
  }
}

}  // namespace

void launch_backward_elemt(const Plan& plan, const Backward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto access, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(access)::type;
    constexpr int V = decltype(vector)::value;
    dispatch_backward_epilogue<T, V>(args, [&](auto epilogue) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             backward_elemt<T, W, V, typename decltype(epilogue)::type>, geometry_of(plan, args.problem.dtype), args,
             sums_of(plan, args));
    });
  });
}

}  // namespace fastbn::cuda
