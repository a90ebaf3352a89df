// In: the gradient of the output, the input, its moments. Out: the gradients of input, weight and bias, in one launch
// that reads both and writes the first once: a group of blocks keeps an item of both in shared memory.
#include "../core/activation.h"
#include "channel.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Walk, class Act>
__global__ void __launch_bounds__(threads_a_block, 4)
    grad_resident(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, unsigned* counters,
                  Act act) {
  using A = acc_t<T>;
  using S = sum_t<T, Walk::slots>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.blocks_an_item, rank = blockIdx.x % g.blocks_an_item;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  const Scratch<A> scratch{shared, g};
  const Slice<T, Walk> slice_dy{shared + g.slices_offset}, slice_x{shared + g.slices_offset + g.slice_bytes};
  const int c = int(threadIdx.x);
  stagger(g);

  unsigned set = 0;
  for (int64_t item = group; item < g.items; item += g.groups, set ^= 1) {
    Walk walk(g, item, rank);
    const Share share = walk.share();
    fetch_all(walk, [&](const Piece& p, int step) {
      slice_dy.fetch(dy, walk, p, step);
      slice_x.fetch(x, walk, p, step);
    });

    if (c < share.channels) scratch.at(0, c) = coefficient<A>(args.moments[share.first_channel + c]);
    __syncthreads();
    {
      A mean[1][Walk::slots];
      take(walk, scratch, mean);
      ThreadSums<T, Walk::slots, Walk::slots == 1> sums;
      meet_all(
          walk,
          [&](const Piece& p, int step) {
            A gradient[V], value[V];
            widen<T, V>(shared_load16(slice_dy.at(walk, step)), gradient);
            widen<T, V>(shared_load16(slice_x.at(walk, step)), value);
            each_element<V, Walk::slots>(p, [&](int j, int slot) {
              const A dz = act.backward(gradient[j], [&] { return value[j]; });
              sums.add(slot, S(dz), S(value[j]) - S(mean[0][slot]));
            });
          },
          [&] { sums.flush(); });
      block_sums(walk, sums.firsts(), sums.seconds(), scratch);
    }

    if (g.blocks_an_item > 1) {
      // Two sets of packets: a block may be one item ahead of another of its group, which then still reads the last
      // set.
      Sums* const here = static_cast<Sums*>(args.workspace) + (2 * group + set) * g.blocks_an_item * g.channels_an_item;
      if (c < share.channels) here[rank * g.channels_an_item + c] = scratch.template packet<Sums>(c);
      group_barrier(counters + group * counter_stride, rank, g.blocks_an_item);
      merge_packets<OfSums>(here, g, share.channels, scratch);
    }
    if (c < share.channels) {
      const Sums sums = corrected<A>(args, share.first_channel + c, scratch.template packet<Sums>(c));
      if (rank == 0) finish_sums(args, share.first_channel + c, sums);
      set_input_gradient(args, share.first_channel + c, sums, scratch, c);
    }
    __syncthreads();

    A z[4][Walk::slots];  // mean, x_scale, scale, shift
    take(walk, scratch, z);
    walk.start();
    for (int step = 0; walk.more(); ++step, walk.next()) {
      const Piece p = walk.piece();
      A gradient[V], value[V];
      widen<T, V>(shared_load16(slice_dy.at(walk, step)), gradient);
      widen<T, V>(shared_load16(slice_x.at(walk, step)), value);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int slot = Walk::slots == 1 ? 0 : j;
        const A dz = act.backward(gradient[j], [&] { return value[j]; });
        gradient[j] = (dz + (value[j] - z[0][slot]) * z[1][slot]) * z[2][slot] + z[3][slot];
      }
      store_piece<T, V>(dx, p, narrow<T, V>(gradient));
    }
    __syncthreads();  // the scratch is written again for the next item
  }
}

}  // namespace

void launch_grad_resident(const Plan& plan, const Backward& args, const Stream& stream) {
  dispatch_full(plan, args.problem.dtype, [&](auto type, auto walk) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, plan.cooperative, stream.handle},
           grad_resident<T, W, Identity>, geometry_of(plan), args, stream.counters, Identity{});
  });
}

int64_t grad_resident_blocks_of(const Plan& plan, DType dtype) {
  int64_t blocks = 0;
  dispatch_full(plan, dtype, [&](auto type, auto walk) {
    using T = typename decltype(type)::type;
    using W = typename decltype(walk)::type;
    blocks = resident_blocks(grad_resident<T, W, Identity>, plan.threads, plan.shared_bytes);
  });
  return blocks;
}

}  // namespace fastbn::cuda
