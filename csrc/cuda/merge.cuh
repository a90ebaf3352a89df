// Merging the partial results of the blocks that share a channel tile: at once, or in subgroups first. The order
// depends on the plan alone, and the records of a channel lie side by side, so neighbouring lanes read neighbouring
// records.
#pragma once

#include "reduce.cuh"

namespace fastbn::cuda {

constexpr unsigned counter_stride = unsigned(barrier_bytes / sizeof(unsigned));

// How records of one kind are merged: as sums that need no division, and the result from them.
struct OfSums {
  static constexpr bool about_reference = false;
  static FASTBN_D Sums terms(const Record& r, double, double) { return {r.first, r.second}; }
  static FASTBN_D Record whole(const Sums& sum, double, double) { return {sum.first, sum.second}; }
};
// Chan's formula for many parts at once, in float64: sums about the mean of the first part, which is near the others.
struct OfMoments {
  static constexpr bool about_reference = true;
  static FASTBN_D Sums terms(const Record& r, double n, double reference) {
    const double d = r.first - reference;
    return {n * d, r.second + n * d * d};
  }
  static FASTBN_D Record whole(const Sums& sum, double reference, double inverse) {
    const double shift = sum.first * inverse;
    const double m2 = sum.second - sum.first * shift;
    return {reference + shift, m2 < 0 ? 0 : m2};
  }
};

// The record at the same place in the shared memory of another block of the cluster.
FASTBN_D Record cluster_record(const Record* p, unsigned rank) {
  const Bytes16 raw = cluster_load16(p, rank);
  Record r;
  memcpy(&r, &raw, 16);
  return r;
}

// Merges `count` records of each channel: body(channel, Record) is called by one thread for each. Several lanes share a
// channel, so that all warps take part. Their loads are in flight together: they are asynchronous copies to `staging`,
// because there are no registers for them. count_of(i): the values behind record i; inverse: 1 / the values behind all
// of them.
// Only of the channels `first`, first + every, ...
template <class Of, class Count, class Body>
FASTBN_D void merge_records(const Geometry& g, const Record* records, int count, int pitch, int channels, void* staging,
                            const Count& count_of, double inverse, const Body& body, int first = 0, int every = 1) {
  const int lane = opaque(int(threadIdx.x)) & (g.merge_lanes - 1), group = int(threadIdx.x) / g.merge_lanes;
  Record* const staged = static_cast<Record*>(staging) + group * g.merge_batch;
#pragma unroll 1
  for (int base = 0; first + base * every < channels; base += g.merge_channels) {
    const int c = first + (base + group) * every;
    const int first_of_warp = group / (lanes_per_warp / g.merge_lanes) * (lanes_per_warp / g.merge_lanes);
    if (first + (base + first_of_warp) * every >= channels) continue;
    const Record* const of = records + int64_t(smaller(c, channels - 1)) * pitch;
    double reference = 0;
    if constexpr (Of::about_reference) reference = load_fresh(&of->first);
    Sums sum{0, 0};
#pragma unroll 1
    for (int from = 0; from < count; from += g.merge_batch) {
      const int n = smaller(g.merge_batch, count - from);
#pragma unroll 1
      for (int i = lane; i < n; i += g.merge_lanes) copy16_fresh(staged + i, of + from + i);
      copies_commit();
      copies_done<0>();
      if (reference - reference != 0) reference = 0;  // an infinite one would make the channel NaN
#pragma unroll 1
      for (int i = lane; i < n; i += g.merge_lanes) {
        const Bytes16 raw = shared_load16(staged + i);
        Record part;
        memcpy(&part, &raw, 16);
        const Sums terms = Of::terms(part, count_of(from + i), reference);
        sum.first += terms.first, sum.second += terms.second;
      }
    }
    sum = lanes_sums(sum, g.merge_lanes);
    if (lane == 0 && c < channels) body(c, Of::whole(sum, reference, inverse));
  }
}

// The records of a channel tile, [channel, part] of the subgroups (or of the blocks, if there are none) and then, with
// subgroups, [part, channel, member] of the blocks; and the counters of its blocks.
struct Meeting {
  const Geometry& g;
  const unsigned split;
  unsigned* const barrier;  // resident
  unsigned* const tickets;  // one for each subgroup, and one for all (streaming)
  void* const staging;      // g.staging_bytes of shared memory

  FASTBN_D unsigned parts() const { return (g.batch_splits + g.subgroup - 1) / g.subgroup; }
  FASTBN_D unsigned part() const { return split / g.subgroup; }
  FASTBN_D int64_t size() const {
    return int64_t(g.subgroup > 1 && g.cluster == 1 ? parts() * (g.subgroup + 1) : parts()) * g.channels_per_tile;
  }
  // Of a group, in one of its two sets.
  FASTBN_D Record* records(void* workspace, unsigned group, unsigned set) const {
    return static_cast<Record*>(workspace) + (2 * group + set) * size();
  }
  FASTBN_D Record* of_members(Record* records) const {
    return records + (int64_t(parts()) + int64_t(part()) * g.subgroup) * g.channels_per_tile;
  }
  FASTBN_D void publish(Record* records, int c, const Record& r) const {
    if (has_clusters && g.cluster > 1) return;  // the others read it in the shared memory of this block
    if (g.subgroup == 1) {
      records[int64_t(c) * g.batch_splits + split] = r;
    } else {
      of_members(records)[int64_t(c) * g.subgroup + split % g.subgroup] = r;
    }
  }

  // True in the last block that takes the ticket: it sees what the others wrote before a barrier of the block. The
  // ticket is zero again after it.
  FASTBN_D bool is_last(unsigned* ticket, unsigned blocks) const {
    bool last = false;
    if (threadIdx.x == 0) last = take_ticket(ticket, blocks - 1) == blocks - 1;
    return __syncthreads_or(last) != 0;
  }

  // Merges the records of this block's subgroup, in the last of its blocks, where it returns true after a barrier.
  template <class Of, class Access>
  FASTBN_D bool merge_subgroup(const Access& access, Record* records, int channels) const {
    const unsigned first = part() * g.subgroup, last = smaller(first + g.subgroup, g.batch_splits);
    if (!is_last(tickets + part() * counter_stride, last - first)) return false;
    const double n = access.count_of(first, last);
    const auto count_of = [&](int i) { return access.count_of(first + unsigned(i), first + unsigned(i) + 1); };
    merge_records<Of>(g, of_members(records), int(last - first), int(g.subgroup), channels, staging, count_of,
                      n == 0 ? 0 : 1 / n, [&](int c, const Record& r) { records[int64_t(c) * parts() + part()] = r; });
    __syncthreads();
    return true;
  }
  template <class Of, class Access, class Body>
  FASTBN_D void merge_parts(const Access& access, const Record* records, int channels, const Body& body, int first = 0,
                            int every = 1) const {
    const auto count_of = [&](int i) {
      const unsigned from = unsigned(i) * g.subgroup;
      return access.count_of(from, smaller(from + g.subgroup, g.batch_splits));
    };
    merge_records<Of>(g, records, int(parts()), int(parts()), channels, staging, count_of, g.inverse_count, body, first,
                      every);
  }

  // Streaming: the last block merges, where it returns true. The blocks published their records before a barrier.
  template <class Of, class Access, class Body>
  FASTBN_D bool merge_in_last(const Access& access, const Record* records, int channels, const Body& body) const {
    if (g.subgroup > 1 && !merge_subgroup<Of>(access, const_cast<Record*>(records), channels)) return false;
    if (!is_last(tickets + (g.subgroup > 1 ? parts() : 0) * counter_stride, parts())) return false;
    merge_parts<Of>(access, records, channels, body);
    return true;
  }

  // Resident: a barrier of the group, after which every block merges. The counter is zero at first; the increments of
  // all parts together flip its top bit and leave the rest as it was, so it needs no reset. `before`: the counter
  // before any block of the group was here. The blocks must all be resident: a cooperative launch.
  static constexpr unsigned top_bit = 0x80000000u;
  FASTBN_D unsigned counter_before() const {
    return g.batch_splits > 1 && threadIdx.x == 0 ? load_relaxed(barrier) : 0;
  }
  FASTBN_D void arrive(bool first, unsigned arrivals) const {
    if (threadIdx.x == 0) add_release(barrier, first ? top_bit - (arrivals - 1) : 1u);
  }
  FASTBN_D void wait(unsigned& before) const {
    if (threadIdx.x == 0) wait_until([&] { return ((load_acquire(barrier) ^ before) & top_bit) != 0; });
    before ^= top_bit;
    __syncthreads();
  }
  template <class Of, class Access, class Body>
  FASTBN_D void merge_in_all(const Access& access, Record* records, int channels, unsigned& before,
                             const Body& body) const {
    if (g.subgroup == 1 || merge_subgroup<Of>(access, records, channels)) arrive(part() == 0, parts());
    wait(before);
    merge_parts<Of>(access, records, channels, body);
  }

  // The same in clusters, which merge the records of their blocks through shared memory. Each block of a cluster merges
  // some of the channels, and all read the results of the others: with a single cluster nothing goes through global
  // memory. Called by all threads; body(channel, Record) by one for each channel.
  template <class Of, class Access, class A, class Body>
  FASTBN_D void merge_in_clusters(const Access& access, const Scratch<A>& scratch, Record* records, int channels,
                                  unsigned& before, const Body& body) const {
    const int size = int(g.cluster), rank = int(split) % size, member = int(threadIdx.x) & (size - 1);
    const unsigned first = split - unsigned(rank);
    const bool alone = g.batch_splits == g.cluster;
    cluster_arrive();
    cluster_wait();
    const double n = access.count_of(first, first + g.cluster), inverse = n == 0 ? 0 : 1 / n;
#pragma unroll 1
    for (int base = rank; base < channels; base += g.threads) {
      const int c = base + int(threadIdx.x) / size * size;
      Record r{};
      if (c < channels) r = cluster_record(&scratch.record(c), unsigned(member));
      double reference = 0;
      if constexpr (Of::about_reference) {
        reference = __shfl_sync(all_lanes, r.first, int(threadIdx.x) % lanes_per_warp - member);
        if (reference - reference != 0) reference = 0;  // an infinite one would make the channel NaN
      }
      const unsigned of = first + unsigned(member);
      const Sums sum = lanes_sums(Of::terms(r, access.count_of(of, of + 1), reference), size);
      if (member != 0 || c >= channels) continue;
      const Record merged = Of::whole(sum, reference, inverse);
      if (alone) {
        scratch.merged(c) = merged;
      } else {
        records[int64_t(c) * parts() + part()] = merged;
      }
    }
    if (!alone) {
      __syncthreads();
      arrive(split == 0, g.batch_splits);
      wait(before);
      merge_parts<Of>(access, records, channels, [&](int c, const Record& r) { scratch.merged(c) = r; }, rank, size);
    }
    cluster_arrive();
    cluster_wait();
    for (int c = int(threadIdx.x); c < channels; c += g.threads) {
      body(c, cluster_record(&scratch.merged(c), unsigned(c % size)));
    }
  }
};

// Of the blocks of a group of the resident strategy.
FASTBN_D Meeting group_meeting(const Geometry& g, unsigned group_, unsigned split_, unsigned* barriers,
                               unsigned* tickets, void* staging) {
  const unsigned group = unsigned(opaque(int(group_))), split = unsigned(opaque(int(split_)));
  const unsigned parts = (g.batch_splits + g.subgroup - 1) / g.subgroup;
  return {g, split, barriers + group * counter_stride, tickets + group * parts * counter_stride, staging};
}

// Of the blocks of a channel tile of the streaming strategy.
FASTBN_D Meeting tile_meeting(const Geometry& g, int64_t channel_tile, unsigned split, unsigned* tickets,
                              void* staging) {
  const unsigned parts = (g.batch_splits + g.subgroup - 1) / g.subgroup;
  return {g, split, nullptr, tickets + channel_tile * (g.subgroup > 1 ? parts + 1 : 1) * counter_stride, staging};
}

}  // namespace fastbn::cuda
