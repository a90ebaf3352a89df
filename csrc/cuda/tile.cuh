// In: a Plan. Out: for each thread of a block, the pieces of an item that are its own, as offsets of whole vectors; and
// the loads and stores of such a piece. Two walks with the same members; kernels are written once for both.
#pragma once

#include "vector.cuh"

namespace fastbn::cuda {

// What kernels need of a Plan.
struct Geometry {
  int64_t stride;  // elements from one row of the matrix to the next
  int64_t channels, channels_an_item, columns_a_channel;
  int64_t items;
  unsigned blocks_an_item, groups;
  int64_t pieces, pieces_a_share;   // of an item, vectors (rows) or rows (columns): all, and what one block has
  double count, inverse_count;      // values of a channel
  int64_t vectors_a_row;            // rows: at most, with both ends within a vector
  int64_t step_rows, step_vectors;  // rows: what threads_a_block vectors are, in whole rows and the rest
  int lanes_a_row, log2_lanes;      // columns
  // In shared memory: where packets and coefficients of channels begin, and the slices (resident), and the size of one.
  int packets_offset, coefficients_offset, slices_offset, slice_bytes;
  int64_t multiprocessors, stagger;
};

constexpr int log2_threads = 8;
static_assert(1 << log2_threads == threads_a_block);

constexpr unsigned counter_stride = unsigned(barrier_bytes / sizeof(unsigned));

Geometry geometry_of(const Plan& plan);

// Elements [first, last) of the vector at offset; all V of them but at the ends of a row.
struct Piece {
  int64_t offset;
  int first, last;
  int64_t index;  // of its byte in a mask: one a vector, so that no two blocks write the same
};

// What one block has of one item.
struct Share {
  int64_t first_channel;
  int channels;  // of the item
  double count;  // values of each channel in this share
};

// An item is one channel: rows of S values. A row of a channel may begin and end within a vector, where S is no whole
// number of vectors; the elements beside it are neither read nor written. Index counts vectors: int where a share fits
// into shared memory, and registers are dear.
template <class T, int V, class Index>
struct RowsWalk {
  static constexpr int slots = 1;  // all elements of a vector are of one channel

  const Geometry& g;
  int64_t item, from, to;  // vectors of the share, counted over all rows
  int64_t offset;          // of the row
  Index vector, left;

  FASTBN_D RowsWalk(const Geometry& geometry, int64_t item_, unsigned rank) : g(geometry), item(item_) {
    from = smaller(rank * g.pieces_a_share, g.pieces);
    to = smaller(from + g.pieces_a_share, g.pieces);
  }

  FASTBN_D void start() {
    const int64_t index = from + threadIdx.x;
    const int64_t row = index / g.vectors_a_row;
    vector = Index(index - row * g.vectors_a_row);
    offset = row * g.stride + item * g.columns_a_channel;
    left = Index(to - index);
  }
  // Where an offset is seldom needed, it is found again rather than kept in registers.
  FASTBN_D void find_offset() {}
  FASTBN_D bool more() const { return left > 0; }
  FASTBN_D void next() {
    left -= Index(threads_a_block);
    vector += Index(g.step_vectors);
    offset += g.step_rows * g.stride;
    if (vector >= Index(g.vectors_a_row)) vector -= Index(g.vectors_a_row), offset += g.stride;
  }
  FASTBN_D Piece piece() const {
    const int64_t within = V == 1 ? 0 : offset & (V - 1);  // of the row's begin, in its first vector
    const int64_t at = int64_t(vector) * V - within;       // in the row
    const int64_t end = g.columns_a_channel - at;
    return {offset + at, at < 0 ? int(-at) : 0, int(larger<int64_t>(0, smaller<int64_t>(V, end))),
            item * g.pieces + (to - left)};
  }

  // Values of the channel that come before a vector.
  FASTBN_D int64_t before(int64_t index) const {
    const int64_t row = index / g.vectors_a_row;
    const int64_t within = V == 1 ? 0 : (row * g.stride + item * g.columns_a_channel) & (V - 1);
    const int64_t at = (index - row * g.vectors_a_row) * V - within;
    return row * g.columns_a_channel + larger<int64_t>(0, smaller(at, g.columns_a_channel));
  }
  FASTBN_D Share share() const { return {item, 1, double(before(to) - before(from))}; }

  // Where a value of a channel of the item is, at or near the begin of the share; -1: nowhere.
  FASTBN_D int64_t some_value(int) const {
    if (from == to) return -1;
    const int64_t row = from / g.vectors_a_row;
    const int64_t begin = row * g.stride + item * g.columns_a_channel;
    return begin + smaller((from - row * g.vectors_a_row) * V, g.columns_a_channel - 1);
  }
  // body(slot, channel of the item) for each slot of this thread.
  template <class Body>
  FASTBN_D void each_slot(const Body& body) const {
    body(0, 0);
  }
  // Where the pieces of a thread lie among those that a block takes in one step.
  FASTBN_D int place() const { return int(threadIdx.x); }
  FASTBN_D int places() const { return int(threads_a_block); }
  FASTBN_D int64_t steps() const { return ceil_div(to - from, threads_a_block); }
  // Of this thread, from where it is.
  FASTBN_D int steps_left() const { return left > 0 ? int((left + Index(threads_a_block - 1)) >> log2_threads) : 0; }
};

// An item is some neighbouring whole vectors of every row; a thread stays at one of them, so that the channels of its
// slots are the same in every row. lanes_a_row is a power of two; lanes beyond the item's vectors are idle. Index
// counts rows.
template <class T, int V, class Index>
struct ColumnsWalk {
  static constexpr int slots = V;

  const Geometry& g;
  int64_t first_channel;
  Index from, to;         // rows of the share
  int channels, vectors;  // of the item
  int64_t offset;
  Index row;

  FASTBN_D ColumnsWalk(const Geometry& geometry, int64_t item, unsigned rank) : g(geometry) {
    first_channel = item * g.channels_an_item;
    channels = int(smaller(g.channels_an_item, g.channels - first_channel));
    vectors = int(channels * g.columns_a_channel / V);
    from = Index(smaller(rank * g.pieces_a_share, g.pieces));
    to = Index(smaller(from + g.pieces_a_share, g.pieces));
  }

  FASTBN_D int lane() const { return int(threadIdx.x) & (g.lanes_a_row - 1); }
  FASTBN_D int rows_a_step() const { return int(threads_a_block) >> g.log2_lanes; }
  FASTBN_D bool idle() const { return lane() >= vectors; }

  FASTBN_D void start() {
    row = from + (int(threadIdx.x) >> g.log2_lanes);
    find_offset();
    if (idle()) row = to;
  }
  FASTBN_D void find_offset() { offset = int64_t(row) * g.stride + first_channel * g.columns_a_channel + lane() * V; }
  FASTBN_D bool more() const { return row < to; }
  FASTBN_D void next() {
    row += rows_a_step();
    offset += rows_a_step() * g.stride;
  }
  FASTBN_D Piece piece() const { return {offset, 0, V, offset / V}; }

  FASTBN_D Share share() const { return {first_channel, channels, double(int64_t(to - from) * g.columns_a_channel)}; }
  FASTBN_D int64_t some_value(int channel) const {
    return from == to ? -1 : int64_t(from) * g.stride + (first_channel + channel) * g.columns_a_channel;
  }
  // Not for lanes that are idle: they have no channels.
  template <class Body>
  FASTBN_D void each_slot(const Body& body) const {
    if (idle()) return;
    const int a_channel = int(g.columns_a_channel), column = opaque(lane() * V);
    int channel = a_channel == 1 ? column : column / a_channel;
    int left = (channel + 1) * a_channel - column;  // columns of that channel from here
#pragma unroll
    for (int j = 0; j < V; ++j) {
      body(j, channel);
      if (--left == 0) ++channel, left = a_channel;
    }
  }
  FASTBN_D int place() const { return (int(threadIdx.x) >> g.log2_lanes) * vectors + lane(); }
  FASTBN_D int places() const { return rows_a_step() * vectors; }
  FASTBN_D int64_t steps() const { return (int64_t(to - from) + rows_a_step() - 1) >> (log2_threads - g.log2_lanes); }
  FASTBN_D int steps_left() const {
    return more() ? int((to - row + rows_a_step() - 1) >> (log2_threads - g.log2_lanes)) : 0;
  }
};

template <class T, int V>
FASTBN_D Raw<T, V> load_piece(const T* x, const Piece& p, bool last_use = false) {
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
FASTBN_D void store_piece(T* y, const Piece& p, const Raw<T, V>& raw) {
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

// The next pieces of a thread, so many that their loads are in flight together: load(u, piece), then use(u, piece) for
// each of them that has elements.
template <int at_once, class Walk, class Load, class Use>
FASTBN_D void take_pieces(Walk& walk, const Load& load, const Use& use) {
  Piece piece[at_once];
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    piece[u] = {0, 0, 0, 0};
    if (!walk.more()) continue;
    piece[u] = walk.piece();
    load(u, piece[u]);
    walk.next();
  }
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    if (piece[u].first < piece[u].last) use(u, piece[u]);
  }
}

// body(j, slot) for each valid element of a piece.
template <int V, int slots, class Body>
FASTBN_D void each_element(const Piece& p, const Body& body) {
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
