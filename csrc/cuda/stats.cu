// In: the input. Out: mean and biased variance of each channel, and running statistics brought up to date. The first
// half of the streaming forward pass.
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight of a thread.
constexpr int at_once = 4;
// Loads whose float sums are added to sums in double: few enough to keep the digits, enough to cost nothing.
constexpr int loads_a_sum = 16;

template <class T, class Walk, int V>
FASTBN_D void sum_differences(Walk& walk, const T* x, const Scratch<acc_t<T>>& scratch,
                              ThreadSums<T, Walk::slots, true>& sums) {
  using A = acc_t<T>;
  A pivot[pivot_rows<T>][Walk::slots];
  take(walk, scratch, pivot);
  walk.start();
  while (walk.more()) {
#pragma unroll 1
    for (int k = 0; k < loads_a_sum && walk.more(); k += at_once) {
      Raw<T, V> raw[at_once];
      take_pieces<at_once>(
          walk, [&](int u, const Piece& p) { raw[u] = load_piece<T, V>(x, p); },
          [&](int u, const Piece& p) {
            A value[V];
            widen<T, V>(raw[u], value);
            each_element<V, Walk::slots>(p, [&](int j, int slot) {
              const auto d = difference<T>(value[j], pivot, slot);
              sums.add(slot, d, d);
            });
          });
    }
    sums.flush();
  }
}

template <class T, class Walk, int V>
__global__ void __launch_bounds__(threads_a_block, 2)
    stats(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, unsigned* counters) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const int64_t item = blockIdx.x / g.blocks_an_item;
  const unsigned rank = blockIdx.x % g.blocks_an_item;
  const T* const x = static_cast<const T*>(args.input);
  Walk walk(g, item, rank);
  const Share share = walk.share();
  const Scratch<A> scratch{shared, g};

  choose_pivots(walk, x, scratch, share.channels);
#pragma unroll 1
  for (int attempt = 0; attempt < attempts<T>; ++attempt) {
    ThreadSums<T, Walk::slots, true> sums;
    sum_differences<T, Walk, V>(walk, x, scratch, sums);
    block_sums(walk, sums.firsts(), sums.seconds(), scratch);
    if (!moments_of_share<T>(share, scratch)) break;
  }

  const int c = int(threadIdx.x);
  if (g.blocks_an_item > 1) {
    Moments* const packets = static_cast<Moments*>(args.workspace) + item * g.blocks_an_item * g.channels_an_item;
    if (c < share.channels) packets[rank * g.channels_an_item + c] = scratch.template packet<Moments>(c);
    if (!is_last_block(counters + item, g.blocks_an_item)) return;
    merge_packets<OfMoments>(packets, g, share.channels, scratch);
  }
  if (c < share.channels) {
    const Moments m = scratch.template packet<Moments>(c);
    finish_moments(args, share.first_channel + c, m.mean, m.m2 * g.inverse_count);
  }
}

}  // namespace

void launch_stats(const Plan& plan, const Forward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto walk, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle}, stats<T, W, decltype(vector)::value>,
           geometry_of(plan), args, tickets(stream));
  });
}

}  // namespace fastbn::cuda
