// The forward pass in one launch that reads and writes each element once: a group of blocks keeps a channel tile in
// shared memory between its reduction and its output.
#include "channel.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Access, class Epilogue>
__global__ void __launch_bounds__(resident_threads, 2)
    resident(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, unsigned* barriers,
             unsigned* tickets) {
  using A = acc_t<T>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.batch_splits, split = blockIdx.x % g.batch_splits;
  const T* const x = static_cast<const T*>(args.input);
  T* const y = static_cast<T*>(args.output);
  const Scratch<A> scratch{shared, g};
  const int c = int(threadIdx.x);
  // What follows from these is computed again for each use, behind opaque(): there are no registers to keep it in.
  const auto meeting = [&] { return group_meeting(g, group, split, barriers, tickets, shared); };
  const auto access_of = [&](int tile) { return Access(g, opaque(tile), unsigned(opaque(int(split)))); };
  unsigned before = meeting().counter_before();
  stagger(g);

  unsigned set = 0;
  for (int channel_tile = int(group); channel_tile < int(g.channel_tiles); channel_tile += int(g.groups), set ^= 1) {
    // Two sets of records: a block may be one channel tile ahead of another one of its group, which still reads the
    // last set.
    const Epilogue epilogue{args};
    const auto records = [&] { return meeting().records(args.workspace, group, set); };
    {
      Access access = access_of(channel_tile);
      const Slice<T> slice(shared + g.slices_offset, access);
      const Tile tile = access.tile();
      const bool mine = c < tile.channels;
      const LoadedParam weight(args.weight, tile.first_channel + c, mine),
          bias(args.bias, tile.first_channel + c, mine);
      const T pivot = mine ? load_pivot(access, x, c) : T{};
      fetch_all(access, [&](const VectorSpan& p, int step) { slice.fetch(x, p, step); });
      if (mine) {
        set_pivot<T>(scratch, c, to_acc(pivot));
        scratch.parameter(0, c) = weight.value(args.weight, 1), scratch.parameter(1, c) = bias.value(args.bias, 0);
      }
      // Behind the copies, so that memory has something to do while the group waits at its barrier.
      epilogue.prefetch_extra(access);
    }
    __syncthreads();
#pragma unroll 1
    for (int attempt = 0; attempt < attempts<T>; ++attempt) {
      Access access = access_of(channel_tile);
      const Slice<T> slice(shared + g.slices_offset, access);
      A pivot[pivot_rows<T>][Access::slots];
      load_coefficients(access, scratch, pivot);
      ThreadSums<T, Access::slots, Access::slots == 1> sums;
      consume_all(
          access,
          [&](const VectorSpan& p, int step) {
            A value[V];
            widen<T, V>(shared_load16(slice.at(step)), value);
            each_element<V, Access::slots>(p, [&](int j, int slot) {
              const auto d = difference<T>(value[j], pivot, slot);
              sums.add(slot, d, d);
            });
          },
          [&] { sums.flush(); });
      bool bad = false;
      block_sums(access, sums.firsts(), sums.seconds(), scratch, [&](int of, const Sums& s) {
        const Record record = tile_moments<T>(access.tile(), s, scratch, of, bad);
        scratch.record(of) = record;
        if (g.batch_splits > 1) meeting().publish(records(), of, record);
      });
      if (__syncthreads_or(bad) == 0) break;
    }

    {
      const Access access = access_of(channel_tile);
      const Tile tile = access.tile();
      const auto finish = [&](int of, const Record& r) {
        const double variance = rounded_product(r.second, g.inverse_count);
        scratch.record(of) = {r.first, variance};
        set_normalization(r.first, variance, args.eps, scratch.parameter(0, of), scratch.parameter(1, of), scratch, of);
      };
      if (has_clusters && g.cluster > 1) {
        meeting().template merge_in_clusters<OfMoments>(access, scratch, records(), tile.channels, before, finish);
      } else if (g.batch_splits > 1) {
        meeting().template merge_in_all<OfMoments>(access, records(), tile.channels, before, finish);
      } else if (c < tile.channels) {
        finish(c, scratch.record(c));
      }
    }
    __syncthreads();

    Access access = access_of(channel_tile);
    const Slice<T> slice(shared + g.slices_offset, access);
    A z[3][Access::slots];  // mean, scale, shift
    load_coefficients(access, scratch, z);
    // Residual loads in flight per thread, as many as there are registers for.
    constexpr int at_once = Epilogue::with_residual && Access::slots == 1 ? 2 : 1;
    access.start();
#pragma unroll 1
    for (int step = 0; step < access.steps; step += at_once) {
      VectorSpan span[at_once];
      typename Epilogue::Extra extra[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        span[u] = step + u < access.steps ? access.span() : VectorSpan{0, 0, 0, 0};
        if (at_once == 1 || span[u].first < span[u].last) extra[u] = epilogue.load_extra(span[u]);
        access.next();
      }
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (at_once > 1 && span[u].first >= span[u].last) continue;
        A value[V];
        widen<T, V>(shared_load16(slice.at(step + u)), value);
        if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
        normalize_elements<Access::slots>(value, z);
        epilogue.apply(span[u], extra[u], value);
        store_span<T, V>(y, span[u], narrow<T, V>(value));
      }
    }
    const Tile written = access_of(channel_tile).tile();
    if (split == 0 && c < written.channels) {
      write_moments(args, written.first_channel + c, scratch.record(c).first, scratch.record(c).second);
    }
    __syncthreads();  // the scratch is written again for the next channel tile
  }
  if (has_clusters && g.cluster > 1) cluster_arrive(), cluster_wait();  // others read the shared memory of this block
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

bool launch_resident(const Plan& plan, const Forward& args, const Stream& stream) {
  bool launched = false;
  with_kernel(plan, args, [&](auto kernel) { launched = launch_group_kernel(kernel, plan, args, stream); });
  return launched;
}

int64_t resident_blocks_of(const Plan& plan, const Forward& args) {
  int64_t blocks = 0;
  with_kernel(plan, args, [&](auto kernel) { blocks = resident_blocks_with(kernel, plan); });
  return blocks;
}

}  // namespace fastbn::cuda
