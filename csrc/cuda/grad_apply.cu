// In: the gradient of the output, the input, the sums that grad_stats left, or those of all ranks. Out: the gradient of
// the input. The second half of the streaming backward pass in training.
#include "channel.cuh"
#include "gradient.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight of a thread, of each tensor.
template <class Walk, class Gradient>
constexpr int loads_at_once = takes_anew<Walk, Gradient> ? 1 : 2;

template <class T, class Walk, int V, class Gradient>
__global__ void __launch_bounds__(threads_a_block, Gradient::plain ? 3 : 2)
    grad_apply(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, const Sums* sums) {
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
  const int c = int(threadIdx.x);
  A shift[Walk::slots] = {};  // of z; its mean and scale are those of dx
  if constexpr (Gradient::recomputes) {
    if (c < share.channels) set_normalization(args, share.first_channel + c, scratch, c);
    __syncthreads();
    walk.each_slot([&](int slot, int channel) { shift[slot] = scratch.at(2, channel); });
    __syncthreads();
  }
  if (c < share.channels) {
    const int64_t channel = share.first_channel + c;
    const bool own = sums != nullptr;
    const double count = own ? double(args.problem.shape.per_channel()) : args.counts[channel];
    set_input_gradient(args, channel, own ? sums[channel] : total_sums(args, channel), count, scratch, c);
  }
  __syncthreads();
  A z[4][Walk::slots];  // mean, x_scale, scale, shift
  take(walk, scratch, z);

  constexpr int at_once = loads_at_once<Walk, Gradient>;
  const Gradient gradient{args};
  walk.start();
  while (walk.more()) {
    Raw<T, V> raw_dy[at_once], raw_x[at_once];
    typename Gradient::Beside beside[at_once];
    take_pieces<at_once>(
        walk,
        [&](int u, const Piece& p) {
          raw_dy[u] = load_piece<T, V>(dy, p, true);
          raw_x[u] = load_piece<T, V>(x, p, true);
          beside[u] = gradient.load_beside(p);
        },
        [&](int u, const Piece& p) {
          A dz[V], value[V];
          widen<T, V>(raw_x[u], value);
          const auto z_of = [&](int j) {
            const int slot = Walk::slots == 1 ? 0 : j;
            return normalized(value[j], z[0][slot], z[2][slot], shift[slot]);
          };
          gradient.keep(p, gradient.turn(beside[u], raw_dy[u], z_of, dz));
          differentiate<Walk::slots>(dz, value, z);
          store_piece<T, V>(dx, p, narrow<T, V>(dz));
        });
  }
}

}  // namespace

void launch_grad_apply(const Plan& plan, const Backward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    constexpr int V = decltype(vector)::value;
    dispatch_gradient<T, V>(args, [&](auto gradient) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             grad_apply<T, W, V, typename decltype(gradient)::type>, geometry_of(plan), args, sums_of(plan, args));
    });
  });
}

}  // namespace fastbn::cuda
