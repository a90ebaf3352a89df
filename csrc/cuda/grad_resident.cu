// In: the gradient of the output, the input, its moments. Out: the gradients of input, weight and bias, in one launch
// that reads both and writes the first once: a group of blocks keeps an item of both in shared memory.
#include "channel.cuh"
#include "gradient.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Walk, class Gradient>
__global__ void __launch_bounds__(threads_a_block, 4)
    grad_resident(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, unsigned* counters) {
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

    const Gradient gradient{args};
    if (c < share.channels) {
      if constexpr (Gradient::recomputes) {
        set_normalization(args, share.first_channel + c, scratch, c);
      } else {
        scratch.at(0, c) = coefficient<A>(args.moments[share.first_channel + c]);
      }
    }
    __syncthreads();
    {
      A z[Gradient::recomputes ? 3 : 1][Walk::slots];  // mean; scale, shift
      take(walk, scratch, z);
      ThreadSums<T, Walk::slots, Walk::slots == 1> sums;
      MasksAhead<Walk> masks{static_cast<const uint8_t*>(args.mask)};
      if constexpr (Gradient::masked) walk.start(), masks.fetch(walk);
      const auto meet = [&](const Piece& p, int step, auto turns, auto adds) {
        A dz[V], value[V];
        const Bytes16 raw_dy = shared_load16(slice_dy.at(walk, step));
        widen<T, V>(shared_load16(slice_x.at(walk, step)), value);
        if constexpr (decltype(turns)::value) {
          if constexpr (takes_anew<Walk, Gradient>) take(walk, scratch, z);
          const auto z_of = [&](int j) {
            const int slot = Walk::slots == 1 ? 0 : j;
            return normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
          };
          typename Gradient::Beside beside;
          if constexpr (Gradient::masked) {
            beside = masks.at(walk, step);
          } else {
            beside = gradient.load_beside(p);
          }
          // In the place of dy, for the thread itself to meet again.
          shared_store16(slice_dy.at(walk, step), gradient.turn(beside, raw_dy, z_of, dz));
        } else {
          widen<T, V>(raw_dy, dz);
        }
        if constexpr (decltype(adds)::value) {
          each_element<V, Walk::slots>(p,
                                       [&](int j, int slot) { sums.add(slot, S(dz[j]), S(value[j]) - S(z[0][slot])); });
        }
      };
      const std::bool_constant<!Gradient::plain> turns;
      const std::true_type yes;
      const std::false_type no;
      // One after the other, where there are no registers for both at once.
      constexpr bool apart = takes_anew<Walk, Gradient> || (spares_registers && !Gradient::plain && Walk::slots == 8);
      if constexpr (apart) {
        meet_all(walk, [&](const Piece& p, int step) { meet(p, step, yes, no); }, [] {});
        take(walk, scratch, z);
        meet_all(walk, [&](const Piece& p, int step) { meet(p, step, no, yes); }, [&] { sums.flush(); });
      } else {
        meet_all(walk, [&](const Piece& p, int step) { meet(p, step, turns, yes); }, [&] { sums.flush(); });
      }
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
      set_input_gradient(args, share.first_channel + c, sums, double(args.problem.shape.per_channel()), scratch, c);
    }
    __syncthreads();

    A z[4][Walk::slots];  // mean, x_scale, scale, shift
    take(walk, scratch, z);
    walk.start();
    for (int step = 0; walk.more(); ++step, walk.next()) {
      const Piece p = walk.piece();
      A dz[V], value[V];
      const Bytes16 raw_dz = shared_load16(slice_dy.at(walk, step));
      gradient.keep(p, raw_dz);
      widen<T, V>(raw_dz, dz);
      widen<T, V>(shared_load16(slice_x.at(walk, step)), value);
      differentiate<Walk::slots>(dz, value, z);
      store_piece<T, V>(dx, p, narrow<T, V>(dz));
    }
    __syncthreads();  // the scratch is written again for the next item
  }
}

template <class Body>
void with_kernel(const Plan& plan, const Backward& args, const Body& body) {
  dispatch_full(plan, args.problem.dtype, [&](auto type, auto walk) {
    using T = typename decltype(type)::type;
    dispatch_gradient<T, full_vector<T>>(args, [&](auto gradient) {
      body(grad_resident<T, typename decltype(walk)::type, typename decltype(gradient)::type>);
    });
  });
}

}  // namespace

void launch_grad_resident(const Plan& plan, const Backward& args, const Stream& stream) {
  with_kernel(plan, args, [&](auto kernel) {
    launch({plan.blocks, plan.threads, plan.shared_bytes, plan.cooperative, stream.handle}, kernel, geometry_of(plan),
           args, stream.counters);
  });
}

int64_t grad_resident_blocks_of(const Plan& plan, const Backward& args) {
  int64_t blocks = 0;
  with_kernel(plan, args, [&](auto kernel) { blocks = resident_blocks(kernel, plan.threads, plan.shared_bytes); });
  return blocks;
}

}  // namespace fastbn::cuda
