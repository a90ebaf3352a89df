// The forward pass in one launch that reads and writes each element once: a group of blocks keeps a channel tile in
// shared memory between its reduction and its output.
#include "channel.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Access, class Epilogue>
__global__ void __launch_bounds__(threads_per_block, 4)
    resident(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, unsigned* counters) {
  using A = acc_t<T>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.batch_splits, split = blockIdx.x % g.batch_splits;
  const T* const x = static_cast<const T*>(args.input);
  T* const y = static_cast<T*>(args.output);
  const Scratch<A> scratch{shared, g};
  const Slice<T, Access> slice{shared + g.slices_offset};
  const int c = int(threadIdx.x);
  stagger(g);

  unsigned set = 0;
  for (int64_t channel_tile = group; channel_tile < g.channel_tiles; channel_tile += g.groups, set ^= 1) {
    Access access(g, channel_tile, split);
    const Tile tile = access.tile();
    fetch_all(access, [&](const VectorSpan& p, int step) { slice.fetch(x, access, p, step); });

    choose_pivots(access, x, scratch, tile.channels);
#pragma unroll 1
    for (int attempt = 0; attempt < attempts<T>; ++attempt) {
      A pivot[pivot_rows<T>][Access::slots];
      load_coefficients(access, scratch, pivot);
      ThreadSums<T, Access::slots, Access::slots == 1> sums;
      consume_all(
          access,
          [&](const VectorSpan& p, int step) {
            A value[V];
            widen<T, V>(shared_load16(slice.at(access, step)), value);
            each_element<V, Access::slots>(p, [&](int j, int slot) {
              const auto d = difference<T>(value[j], pivot, slot);
              sums.add(slot, d, d);
            });
          },
          [&] { sums.flush(); });
      block_sums(access, sums.firsts(), sums.seconds(), scratch);
      if (!tile_moments<T>(tile, scratch)) break;
    }

    if (g.batch_splits > 1) {
      // Two sets of partial sums: a block may be one channel tile ahead of another one of its group, which still reads
      // the last set.
      Moments* const here =
          static_cast<Moments*>(args.workspace) + (2 * group + set) * g.batch_splits * g.channels_per_tile;
      if (c < tile.channels) here[split * g.channels_per_tile + c] = scratch.template partial<Moments>(c);
      group_barrier(counters + group * counter_stride, split, g.batch_splits);
      merge_partials<OfMoments>(here, g, tile.channels, scratch);
    }
    if (c < tile.channels) {
      const Moments m = scratch.template partial<Moments>(c);
      const double variance = m.m2 * g.inverse_count;
      if (split == 0) write_moments(args, tile.first_channel + c, m.mean, variance);
      set_normalization(args, tile.first_channel + c, m.mean, variance, scratch, c);
    }
    __syncthreads();

    A z[3][Access::slots];  // mean, scale, shift
    load_coefficients(access, scratch, z);
    // Residual loads in flight per thread, as many as there are registers for.
    constexpr int at_once = Epilogue::with_residual && Access::slots < 8 ? 2 : 1;
    const Epilogue epilogue{args};
    access.start();
    for (int step = 0; access.more(); step += at_once) {
      typename Epilogue::Extra extra[at_once];
      for_each_span<at_once>(
          access, [&](int u, const VectorSpan& p) { extra[u] = epilogue.load_extra(p); },
          [&](int u, const VectorSpan& p) {
            A value[V];
            widen<T, V>(shared_load16(slice.at(access, step + u)), value);
            if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
            normalize_elements<Access::slots>(value, z);
            epilogue.apply(p, extra[u], value);
            store_span<T, V>(y, p, narrow<T, V>(value));
          });
    }
    __syncthreads();  // the scratch is written again for the next channel tile
  }
}

template <class Body>
void with_kernel(const Plan& plan, const Forward& args, const Body& body) {
  dispatch_full(plan, args.problem.dtype, [&](auto type, auto access) {
    using T = typename decltype(type)::type;
    dispatch_epilogue<T, full_vector<T>>(args.epilogue, [&](auto epilogue) {
      body(resident<T, typename decltype(access)::type, typename decltype(epilogue)::type>);
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
