// In: the gradient of the output, the input, its moments. Out: the gradients of weight and bias, and for grad_apply the
// sums behind them. In eval that of the input too, in the same reading: there it needs no sums.
#include "channel.cuh"
#include "gradient.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight of a thread, of each tensor.
template <class Walk, class Gradient>
constexpr int loads_at_once = takes_anew<Walk, Gradient> ? 1 : 2;
constexpr int loads_a_sum = 16;

// summing, scaling: which of the two an eval pass was asked for; a training pass sums.
template <class T, class Walk, int V, class Gradient>
__global__ void __launch_bounds__(threads_a_block, 2)
    grad_stats(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, Sums* sums,
               unsigned* counters, bool summing, bool scaling) {
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
  if (c < share.channels) set_normalization(args, share.first_channel + c, scratch, c);
  __syncthreads();
  A z[3][Walk::slots];  // mean, scale, shift
  take(walk, scratch, z);

  constexpr int at_once = loads_at_once<Walk, Gradient>;
  const Gradient gradient{args};
  const bool reading = summing || gradient.needs_input();
  ThreadSums<T, Walk::slots, true> thread_sums;
  walk.start();
  while (walk.more()) {
#pragma unroll 1
    for (int k = 0; k < loads_a_sum && walk.more(); k += at_once) {
      Raw<T, V> raw_dy[at_once], raw_x[at_once];
      typename Gradient::Beside beside[at_once];
      take_pieces<at_once>(
          walk,
          [&](int u, const Piece& p) {
            raw_dy[u] = load_piece<T, V>(dy, p, Gradient::masked);
            raw_x[u] = reading ? load_piece<T, V>(x, p) : Raw<T, V>{};
            beside[u] = gradient.load_beside(p);
          },
          [&](int u, const Piece& p) {
            A dz[V], value[V];
            widen<T, V>(raw_x[u], value);
            if constexpr (takes_anew<Walk, Gradient>) take(walk, scratch, z);
            const auto z_of = [&](int j) {
              const int slot = Walk::slots == 1 ? 0 : j;
              return normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
            };
            const Raw<T, V> raw_dz = gradient.turn(beside[u], raw_dy[u], z_of, dz);
            if (scaling) gradient.keep(p, raw_dz);
            if constexpr (takes_anew<Walk, Gradient>) take(walk, scratch, z);
            each_element<V, Walk::slots>(p, [&](int j, int slot) {
              thread_sums.add(slot, S(dz[j]), S(value[j]) - S(z[0][slot]));
              dz[j] *= z[1][slot];
            });
            if (scaling) store_piece<T, V>(dx, p, narrow<T, V>(dz));
          });
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
    constexpr int V = decltype(vector)::value;
    dispatch_gradient<T, V>(args, [&](auto gradient) {
      launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle},
             grad_stats<T, W, V, typename decltype(gradient)::type>, geometry_of(plan), args, sums_of(plan, args),
             tickets(stream), args.training || wants_sums, !args.training && args.grad_input != nullptr);
    });
  });
}

}  // namespace fastbn::cuda
