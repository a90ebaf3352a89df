// Access patterns: which 16-byte vectors of a tile belong to a thread, and their loads and stores. RowAccess and
// ColumnAccess have the same members, so kernels are written once for both.
#pragma once

#include "vector.cuh"

namespace fastbn::cuda {

// The part of a Plan that kernels use.
struct Geometry {
  int64_t stride;  // elements from one row of the matrix to the next
  int64_t channels, channels_per_tile, columns_per_channel;
  int64_t channel_tiles;
  unsigned batch_splits, groups, subgroup, cluster;
  int64_t extent,
      extent_per_split;         // vectors (rows) or rows (columns) of a channel tile, and of one split
  double count, inverse_count;  // values of a channel
  int64_t vectors_per_row;      // rows: at most, with both ends within a vector
  // What a step of the block is: rows: in whole rows and the rest; columns: in rows. step_offset: the same in elements.
  // wrap_offset: rows: from the end of a row to the next one.
  int64_t step_rows, step_vectors, step_offset, wrap_offset;
  int threads, log2_threads, warps;
  int lanes_per_row;  // columns
  bool spans_vectors;
  // Lanes that merge a channel together, channels that are merged at the same time, records of each that are staged.
  int merge_lanes, merge_channels, merge_batch;
  // Offsets in shared memory of the records, parameters and coefficients of channels and (resident) of the slices, and
  // the size of a slice.
  int records_offset, parameters_offset, coefficients_offset, slices_offset, slice_bytes;
  int64_t multiprocessors, stagger;
};

Geometry geometry_of(const Plan& plan, DType dtype);

// Elements [first, last) of the vector at offset: all V of them except at the ends of a row.
struct VectorSpan {
  int64_t offset;
  int first, last;
  int64_t index;  // of its mask byte: one per vector, so that no two blocks write the same byte
};

// The part of a channel tile that one block processes: one batch split of it.
struct Tile {
  int64_t first_channel;
  int channels;  // of the channel tile
  double count;  // values of each channel in this tile
};

// A channel tile is one channel: rows of S values. whole: S is a multiple of V. If it is not, a row may start and end
// within a vector; the elements beside it are neither read nor written. Index counts vectors: int if a tile fits into
// shared memory, to save registers.
template <class T, int V, class Index, bool whole>
struct RowAccess {
  static constexpr int slots = 1;  // all elements of a vector are of one channel

  const Geometry& g;
  int64_t channel_tile;
  Index from, to;  // vectors of the tile, counted over all rows
  int64_t offset;  // whole: of the vector; otherwise of the row
  Index vector, left;
  int steps;  // vectors of this thread

  FASTBN_D RowAccess(const Geometry& geometry, int64_t channel_tile_, unsigned split)
      : g(geometry), channel_tile(channel_tile_) {
    from = Index(smaller(split * g.extent_per_split, g.extent));
    to = Index(smaller(from + g.extent_per_split, g.extent));
    const Index mine = to - from - Index(threadIdx.x);
    steps = mine > 0 ? int((mine + Index(g.threads - 1)) >> g.log2_threads) : 0;
  }

  FASTBN_D void start() {
    const Index index = from + Index(threadIdx.x);
    const Index row = index / Index(g.vectors_per_row);
    vector = index - row * Index(g.vectors_per_row);
    offset = row * g.stride + channel_tile * g.columns_per_channel;
    if constexpr (whole) offset += int64_t(vector) * V;
    left = to - index;
  }
  // Recomputes an offset that is needed too rarely to keep it in a register.
  FASTBN_D void find_offset() {}
  FASTBN_D bool more() const { return left > 0; }
  FASTBN_D void next() {
    left -= Index(g.threads);
    vector += Index(g.step_vectors);
    offset += g.step_offset;
    if (vector >= Index(g.vectors_per_row)) vector -= Index(g.vectors_per_row), offset += g.wrap_offset;
  }
  FASTBN_D VectorSpan span() const {
    const int64_t index = channel_tile * g.extent + (to - left);
    if constexpr (whole) {
      return {offset, 0, V, index};
    } else {
      const int64_t within = V == 1 ? 0 : offset & (V - 1);  // of the first element of the row in its vector
      const int64_t at = int64_t(vector) * V - within;       // in the row
      const int64_t end = g.columns_per_channel - at;
      return {offset + at, at < 0 ? int(-at) : 0, int(larger<int64_t>(0, smaller<int64_t>(V, end))), index};
    }
  }

  // The number of values of the channel in front of a vector.
  FASTBN_D int64_t before(Index index) const {
    if constexpr (whole) return int64_t(index) * V;
    const Index row = index / Index(g.vectors_per_row);
    const int64_t within = V == 1 ? 0 : (row * g.stride + channel_tile * g.columns_per_channel) & (V - 1);
    const int64_t at = int64_t(index - row * Index(g.vectors_per_row)) * V - within;
    return row * g.columns_per_channel + larger<int64_t>(0, smaller(at, g.columns_per_channel));
  }
  // The number of values of a channel in some splits.
  FASTBN_D double count_of(unsigned first_split, unsigned last_split) const {
    const Index first = Index(smaller(first_split * g.extent_per_split, g.extent));
    return double(before(Index(smaller(last_split * g.extent_per_split, g.extent))) - before(first));
  }
  FASTBN_D Tile tile() const { return {channel_tile, 1, double(before(to) - before(from))}; }

  // The offset of a value of a channel at the start of the tile, as its pivot; -1: the tile is empty.
  FASTBN_D int64_t pivot_probe(int) const {
    if (from == to) return -1;
    const Index row = from / Index(g.vectors_per_row);
    const int64_t begin = row * g.stride + channel_tile * g.columns_per_channel;
    return begin + smaller(int64_t(from - row * Index(g.vectors_per_row)) * V, g.columns_per_channel - 1);
  }
  // Calls body(slot, channel of the channel tile) for each slot of this thread.
  template <class Body>
  FASTBN_D void each_slot(const Body& body) const {
    body(0, 0);
  }
  // The index of a thread's vector among those that a block processes in one step.
  FASTBN_D int place() const { return int(threadIdx.x); }
  FASTBN_D int places() const { return g.threads; }
};

// A channel tile is some neighbouring whole vectors of every row. A thread stays in one column of vectors, so that its
// slots belong to the same channels in every row. Lanes beyond the vectors of the channel tile are idle. Index counts
// rows.
template <class T, int V, class Index>
struct ColumnAccess {
  static constexpr int slots = V;

  const Geometry& g;
  int64_t first_channel;
  Index from, to;         // rows of the tile
  int channels, vectors;  // of the channel tile
  int lane, row_in_step;  // of this thread
  int64_t offset;
  Index row;
  int steps;  // vectors of this thread

  FASTBN_D ColumnAccess(const Geometry& geometry, int64_t channel_tile, unsigned split) : g(geometry) {
    first_channel = channel_tile * g.channels_per_tile;
    channels = int(smaller(g.channels_per_tile, g.channels - first_channel));
    vectors = int(channels * g.columns_per_channel / V);
    from = Index(smaller(split * g.extent_per_split, g.extent));
    to = Index(smaller(from + g.extent_per_split, g.extent));
    const int thread = opaque(int(threadIdx.x));
    row_in_step = int(unsigned(thread) / unsigned(g.lanes_per_row));
    lane = thread - row_in_step * g.lanes_per_row;
    const Index mine = to - from - row_in_step;
    steps = idle() || mine <= 0 ? 0 : int((mine + Index(g.step_rows - 1)) / Index(g.step_rows));
  }

  // Of a full step there are step_rows rows; a block may have some threads more.
  FASTBN_D bool idle() const { return lane >= vectors || row_in_step >= int(g.step_rows); }

  FASTBN_D void start() {
    row = from + row_in_step;
    find_offset();
    if (idle()) row = to;
  }
  FASTBN_D void find_offset() { offset = int64_t(row) * g.stride + first_channel * g.columns_per_channel + lane * V; }
  FASTBN_D bool more() const { return row < to; }
  FASTBN_D void next() {
    row += Index(g.step_rows);
    offset += g.step_offset;
  }
  FASTBN_D VectorSpan span() const { return {offset, 0, V, offset / V}; }

  FASTBN_D double count_of(unsigned first_split, unsigned last_split) const {
    const int64_t first = smaller(first_split * g.extent_per_split, g.extent);
    return double((smaller(last_split * g.extent_per_split, g.extent) - first) * g.columns_per_channel);
  }
  FASTBN_D Tile tile() const { return {first_channel, channels, double(int64_t(to - from) * g.columns_per_channel)}; }
  FASTBN_D int64_t pivot_probe(int channel) const {
    return from == to ? -1 : int64_t(from) * g.stride + (first_channel + channel) * g.columns_per_channel;
  }
  // Skips idle lanes, which have no channels.
  template <class Body>
  FASTBN_D void each_slot(const Body& body) const {
    if (idle()) return;
    const int channel_width = int(g.columns_per_channel), column = opaque(lane * V);
    int channel = channel_width == 1 ? column : column / channel_width;
    int left = (channel + 1) * channel_width - column;  // columns of that channel from here
#pragma unroll
    for (int j = 0; j < V; ++j) {
      body(j, channel);
      if (--left == 0) ++channel, left = channel_width;
    }
  }
  FASTBN_D int place() const { return row_in_step * int(g.vectors_per_row) + lane; }
  FASTBN_D int places() const { return int(g.step_rows) * int(g.vectors_per_row); }
};

template <class T, int V>
FASTBN_D Raw<T, V> load_span(const T* x, const VectorSpan& p, bool last_use = false) {
  if constexpr (V == 1) {
    return p.first < p.last ? load(x + p.offset) : T{};
  } else {
    if (p.first == 0 && p.last == V) return last_use ? load16_last(x + p.offset) : load16(x + p.offset);
    T e[V] = {};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= p.first && j < p.last) e[j] = last_use ? load_last(x + p.offset + j) : load(x + p.offset + j);
    }
    Bytes16 raw;
    memcpy(&raw, e, 16);
    return raw;
  }
}

template <class T, int V>
FASTBN_D void store_span(T* y, const VectorSpan& p, const Raw<T, V>& raw) {
  if constexpr (V == 1) {
    if (p.first < p.last) store(y + p.offset, raw);
  } else {
    if (p.first == 0 && p.last == V) {
      store16(y + p.offset, raw);
      return;
    }
    T e[V];
    memcpy(e, &raw, 16);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= p.first && j < p.last) store(y + p.offset + j, e[j]);
    }
  }
}

// Processes the next spans of a thread with their loads in flight together: load(u, span) for each, then use(u, span)
// for each that has elements.
template <int at_once, class Access, class Load, class Use>
FASTBN_D void for_each_span(Access& access, const Load& load, const Use& use) {
  VectorSpan span[at_once];
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    span[u] = {0, 0, 0, 0};
    if (!access.more()) continue;
    span[u] = access.span();
    load(u, span[u]);
    access.next();
  }
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    if (span[u].first < span[u].last) use(u, span[u]);
  }
}

// Requests the part of a tensor that the thread will read, from the second-level cache on: memory then has something to
// do while the group waits at its barrier. Every other vector is in a sector of its own.
template <class T, class Access>
FASTBN_D void prefetch_all(Access& access, const T* x) {
  access.start();
#pragma unroll 1
  for (int step = 0; step < access.steps; ++step, access.next()) {
    const VectorSpan p = access.span();
    if (p.first < p.last && p.offset / full_vector<T> % 2 == 0) prefetch(x + p.offset);
  }
}

// Calls body(j, slot) for each valid element of a span.
template <int V, int slots, class Body>
FASTBN_D void each_element(const VectorSpan& p, const Body& body) {
  if (p.first == 0 && p.last == V) {
#pragma unroll
    for (int j = 0; j < V; ++j) body(j, slots == 1 ? 0 : j);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= p.first && j < p.last) body(j, slots == 1 ? 0 : j);
    }
  }
}

}  // namespace fastbn::cuda
