// In: the input. Out: the output, its moments, running statistics, in one launch that reads and writes each element
// once: a group of blocks keeps an item in shared memory between its sums and its output.
#include "channel.cuh"
#include "ending.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Walk, class Ending>
__global__ void __launch_bounds__(threads_a_block, 4)
    resident(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, unsigned* counters) {
  using A = acc_t<T>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.blocks_an_item, rank = blockIdx.x % g.blocks_an_item;
  const T* const x = static_cast<const T*>(args.input);
  T* const y = static_cast<T*>(args.output);
  const Scratch<A> scratch{shared, g};
  const Slice<T, Walk> slice{shared + g.slices_offset};
  const int c = int(threadIdx.x);
  stagger(g);

  unsigned set = 0;
  for (int64_t item = group; item < g.items; item += g.groups, set ^= 1) {
    Walk walk(g, item, rank);
    const Share share = walk.share();
    fetch_all(walk, [&](const Piece& p, int step) { slice.fetch(x, walk, p, step); });

    choose_pivots(walk, x, scratch, share.channels);
#pragma unroll 1
    for (int attempt = 0; attempt < attempts<T>; ++attempt) {
      A pivot[pivot_rows<T>][Walk::slots];
      take(walk, scratch, pivot);
      ThreadSums<T, Walk::slots, Walk::slots == 1> sums;
      meet_all(
          walk,
          [&](const Piece& p, int step) {
            A value[V];
            widen<T, V>(shared_load16(slice.at(walk, step)), value);
            each_element<V, Walk::slots>(p, [&](int j, int slot) {
              const auto d = difference<T>(value[j], pivot, slot);
              sums.add(slot, d, d);
            });
          },
          [&] { sums.flush(); });
      block_sums(walk, sums.firsts(), sums.seconds(), scratch);
      if (!moments_of_share<T>(share, scratch)) break;
    }

    if (g.blocks_an_item > 1) {
      // Two sets of packets: a block may be one item ahead of another of its group, which then still reads the last
      // set.
      Moments* const here =
          static_cast<Moments*>(args.workspace) + (2 * group + set) * g.blocks_an_item * g.channels_an_item;
      if (c < share.channels) here[rank * g.channels_an_item + c] = scratch.template packet<Moments>(c);
      group_barrier(counters + group * counter_stride, rank, g.blocks_an_item);
      merge_packets<OfMoments>(here, g, share.channels, scratch);
    }
    if (c < share.channels) {
      const Moments m = scratch.template packet<Moments>(c);
      const double variance = m.m2 * g.inverse_count;
      if (rank == 0) finish_moments(args, share.first_channel + c, m.mean, variance);
      set_normalization(args, share.first_channel + c, m.mean, variance, scratch, c);
    }
    __syncthreads();

    A z[3][Walk::slots];  // mean, scale, shift
    take(walk, scratch, z);
    // Residuals in flight of a thread: as many as there are registers for.
    constexpr int at_once = Ending::with_residual && Walk::slots < 8 ? 2 : 1;
    const Ending ending{args};
    walk.start();
    for (int step = 0; walk.more(); step += at_once) {
      typename Ending::Beside beside[at_once];
      take_pieces<at_once>(
          walk, [&](int u, const Piece& p) { beside[u] = ending.load_beside(p); },
          [&](int u, const Piece& p) {
            A value[V];
            widen<T, V>(shared_load16(slice.at(walk, step + u)), value);
            if constexpr (takes_anew<Walk, Ending>) take(walk, scratch, z);
            normalize<Walk::slots>(value, z);
            ending.finish(p, beside[u], value);
            store_piece<T, V>(y, p, narrow<T, V>(value));
          });
    }
    __syncthreads();  // the scratch is written again for the next item
  }
}

template <class Body>
void with_kernel(const Plan& plan, const Forward& args, const Body& body) {
  dispatch_full(plan, args.problem.dtype, [&](auto type, auto walk) {
    using T = typename decltype(type)::type;
    dispatch_ending<T, full_vector<T>>(args.epilogue, [&](auto ending) {
      body(resident<T, typename decltype(walk)::type, typename decltype(ending)::type>);
    });
  });
}

}  // namespace

void launch_resident(const Plan& plan, const Forward& args, const Stream& stream) {
  with_kernel(plan, args, [&](auto kernel) {
    launch({plan.blocks, plan.threads, plan.shared_bytes, plan.cooperative, stream.handle}, kernel, geometry_of(plan),
           args, stream.counters);
  });
}

int64_t resident_blocks_of(const Plan& plan, const Forward& args) {
  int64_t blocks = 0;
  with_kernel(plan, args, [&](auto kernel) { blocks = resident_blocks(kernel, plan.threads, plan.shared_bytes); });
  return blocks;
}

}  // namespace fastbn::cuda
