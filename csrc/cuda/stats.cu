// The mean and biased variance of each channel, and the running statistics: the first launch of the streaming forward
// pass.
#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Loads in flight per thread.
constexpr int at_once = 4;
// Loads whose float32 sums are accumulated before they are moved to float64: few enough to keep the digits.
constexpr int loads_per_sum = 16;

template <class T, class Access, int V>
FASTBN_D void sum_differences(Access& access, const T* x, const Scratch<acc_t<T>>& scratch,
                              ThreadSums<T, Access::slots, true>& sums) {
  using A = acc_t<T>;
  A pivot[pivot_rows<T>][Access::slots];
  load_coefficients(access, scratch, pivot);
  access.start();
  while (access.more()) {
#pragma unroll 1
    for (int k = 0; k < loads_per_sum && access.more(); k += at_once) {
      Raw<T, V> raw[at_once];
      for_each_span<at_once>(
          access, [&](int u, const VectorSpan& p) { raw[u] = load_span<T, V>(x, p); },
          [&](int u, const VectorSpan& p) {
            A value[V];
            widen<T, V>(raw[u], value);
            each_element<V, Access::slots>(p, [&](int j, int slot) {
              const auto d = difference<T>(value[j], pivot, slot);
              sums.add(slot, d, d);
            });
          });
    }
    sums.flush();
  }
}

template <class T, class Access, int V>
__global__ void __launch_bounds__(streaming_threads, 2)
    stats(const __grid_constant__ Geometry g, const __grid_constant__ Forward args, unsigned* tickets) {
  using A = acc_t<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const int64_t channel_tile = blockIdx.x / g.batch_splits;
  const unsigned split = blockIdx.x % g.batch_splits;
  const T* const x = static_cast<const T*>(args.input);
  Access access(g, channel_tile, split);
  const Tile tile = access.tile();
  const Scratch<A> scratch{shared, g};

  const Meeting meeting = tile_meeting(g, channel_tile, split, tickets, shared);
  Record* const records = static_cast<Record*>(args.workspace) + channel_tile * meeting.size();
  const int c = int(threadIdx.x);
  if (c < tile.channels) set_pivot<T>(scratch, c, to_acc(load_pivot(access, x, c)));
  __syncthreads();
#pragma unroll 1
  for (int attempt = 0; attempt < attempts<T>; ++attempt) {
    ThreadSums<T, Access::slots, true> sums;
    sum_differences<T, Access, V>(access, x, scratch, sums);
    bool bad = false;
    block_sums(access, sums.firsts(), sums.seconds(), scratch, [&](int of, const Sums& s) {
      const Record record = tile_moments<T>(tile, s, scratch, of, bad);
      scratch.record(of) = record;
      if (g.batch_splits > 1) meeting.publish(records, of, record);
    });
    if (__syncthreads_or(bad) == 0) break;
  }

  const auto finish = [&](int of, const Record& r) {
    write_moments(args, tile.first_channel + of, r.first, rounded_product(r.second, g.inverse_count));
  };
  if (g.batch_splits > 1) {
    meeting.template merge_in_last<OfMoments>(access, records, tile.channels, finish);
  } else if (c < tile.channels) {
    finish(c, scratch.record(c));
  }
}

}  // namespace

void launch_stats(const Plan& plan, const Forward& args, const Stream& stream) {
  dispatch(plan, args.problem.dtype, [&](auto type, auto access, auto vector) {
    using T = typename decltype(type)::type;
    using W = typename decltype(access)::type;
    launch({plan.blocks, plan.threads, plan.shared_bytes, false, stream.handle}, stats<T, W, decltype(vector)::value>,
           geometry_of(plan, args.problem.dtype), args, stream.tickets);
  });
}

}  // namespace fastbn::cuda
