// The CPU plan: how a tensor is cut into tiles. It does not depend on the number of threads where values are reduced,
// so that results have the same bits on every machine of an instruction set.
#pragma once

#include "../core/problem.h"

namespace fastbn::cpu {

enum class AccessPattern : uint8_t {
  rows,     // channels_first, wide maps: a channel is N rows of S contiguous values
  columns,  // a matrix whose columns belong to channels: channels_last, (N, C), and small maps
};

struct Plan {
  AccessPattern pattern;
  int64_t channel_tiles;      // tiles of the channel axis, each of whole channels
  int64_t channels_per_tile;  // the last one may have fewer
  int64_t
      batch_splits;  // tiles of each channel tile along the batch; 1: a channel tile is processed while it is in cache
  // columns: the tensor as a matrix [rows, columns], plus spare elements that fill no row
  int64_t rows, columns, spare;
  int64_t columns_per_channel;  // neighbouring columns of one channel (S, or 1)
  int64_t split_rows;           // rows in a batch split
  // rows: a batch split is some samples, or a part of a map if there are fewer samples than splits
  int64_t split_samples, split_positions;
  int64_t positions;  // rows: in a map

  int64_t workspace_bytes, mask_bytes;

  // Distance in elements to the same place in the next channel tile.
  int64_t tile_width() const {
    return channels_per_tile * (pattern == AccessPattern::rows ? positions : columns_per_channel);
  }
  // rows: parts of a map
  int64_t parts() const { return ceil_div(positions, split_positions); }
  // A mask has a slot for each pack of `size` elements, numbered along rows: of a channel tile (columns) or of parts of
  // maps (rows). A channel tile has a last row for the spare elements.
  int64_t slot_rows() const { return rows + (spare > 0); }
  int64_t slots_per_row(int64_t size) const {
    if (pattern == AccessPattern::rows) return ceil_div(split_positions, size);
    return ceil_div(channel_tiles == 1 ? columns : channels_per_tile * columns_per_channel, size);
  }
  int64_t slots(int64_t size, const Shape& shape) const {
    return (pattern == AccessPattern::rows ? shape.N * shape.C * parts() : channel_tiles * slot_rows()) *
           slots_per_row(size);
  }
};

// Widest channel tile: its sums and coefficients take 96 KB, which fits in L2.
constexpr int64_t max_columns = 4096;

// Distance between arrays of coefficients: whole cache lines plus one, because arrays a multiple of 4 KiB apart compete
// for the same L1 sets.
constexpr int64_t padded_channels(int64_t channels) { return round_up(channels, 16) + 16; }

// How many channels of small maps make a row of whole cache lines, 4 to 8 KB long.
inline int64_t channels_per_row(int64_t map_bytes, int64_t positions) {
  constexpr int64_t line = 64;
  int64_t group = 1;
  while (group * map_bytes % line != 0) group *= 2;
  while (group * map_bytes < (4 << 10)) group *= 2;
  while (group > 1 && group * positions > max_columns) group /= 2;
  return group;
}

inline Plan make_plan(const Problem& problem) {
  const Shape& shape = problem.shape;
  const int64_t element_size = size_of(problem.dtype);
  constexpr int64_t line = 64;
  // Half of a 512 KB L2, the smallest of current x86 servers.
  constexpr int64_t cache = 256 << 10;
  constexpr int64_t enough_tiles = 32;
  Plan plan{};
  plan.columns_per_channel = 1;

  const bool first = shape.layout == Layout::channels_first;
  // Shorter rows end before the hardware prefetcher has locked on: 28x28 and 14x14 maps are 10-40 % faster as columns
  // of several channels.
  constexpr int64_t shortest_run = 4000;
  // Nor maps of which only several fill whole cache lines: a line shared by two rows rules out streaming stores (1000
  // float32: 5-33 % faster as columns). NOTES.md#access-patterns.
  const int64_t map_bytes = shape.S * element_size;
  const int64_t group = first && shape.S > 1 ? smaller(shape.C, channels_per_row(map_bytes, shape.S)) : 1;
  const bool ragged = map_bytes % line != 0 && group * map_bytes % line == 0;
  if (first && map_bytes >= shortest_run && !ragged) {
    plan.pattern = AccessPattern::rows;
    plan.positions = shape.S;
    plan.channels_per_tile = 1;
    plan.channel_tiles = shape.C;
    const bool split = plan.channel_tiles < enough_tiles && shape.elements() * element_size > cache;
    const int64_t wanted = split ? ceil_div(enough_tiles, plan.channel_tiles) : 1;
    constexpr int64_t fewest_positions = 4096;
    const int64_t parts = larger<int64_t>(1, smaller(wanted / shape.N, shape.S / fewest_positions));
    plan.split_samples = parts > 1 ? 1 : ceil_div(shape.N, smaller(wanted, shape.N));
    plan.split_positions = ceil_div(shape.S, parts);
    plan.batch_splits = ceil_div(shape.N, plan.split_samples) * parts;
    return plan;
  }

  plan.pattern = AccessPattern::columns;
  if (first && shape.S > 1) {
    plan.rows = shape.N;
    plan.columns = shape.C * shape.S;
    plan.columns_per_channel = shape.S;
    plan.channels_per_tile = group;
  } else {
    const int64_t rows = shape.N * shape.S;
    plan.rows = rows;
    plan.columns = shape.C;
    plan.channels_per_tile = smaller(shape.C, max_columns);
    // Few channels: join k rows, so that vectors are full and cache lines whole.
    int64_t k = 1;
    const auto wanting = [&](int64_t bytes) { return bytes < 512 || (bytes % line != 0 && bytes < 2048); };
    while (shape.C * element_size < 512 && k * 2 <= rows && wanting(shape.C * k * element_size)) k *= 2;
    plan.columns = shape.C * k;
    plan.rows = rows / k;
    plan.spare = (rows % k) * shape.C;
  }
  plan.channel_tiles = ceil_div(shape.C, plan.channels_per_tile);
  const int64_t width =
      plan.channel_tiles == 1 ? plan.columns : plan.tile_width();  // joined rows belong to one channel tile
  const int64_t tile_bytes = plan.rows * width * element_size;
  plan.batch_splits = 1;
  plan.split_rows = plan.rows;
  if (tile_bytes > cache) {
    // Smaller splits are not worth the merging of their sums.
    constexpr int64_t fewest_rows = 64, max_splits = 64;
    plan.split_rows =
        larger(larger(fewest_rows, ceil_div(cache * plan.rows, tile_bytes)), ceil_div(plan.rows, max_splits));
    // With few splits, as many for each of 2, 4 or 8 threads (22 % faster at 1.6 MB,
    // NOTES.md#access-patterns), in multiples of the four rows that are processed together.
    const int64_t splits = ceil_div(plan.rows, plan.split_rows);
    if (splits <= 16) {
      plan.split_rows = round_up(ceil_div(plan.rows, round_up(splits, splits > 4 ? 8 : 2)), 4);
    }
    plan.batch_splits = ceil_div(plan.rows, plan.split_rows);
  }
  return plan;
}

// A plan for passes without reductions over contiguous maps: split by samples instead of channels, a part for each
// thread, as the surrounding layers traverse memory, so that a thread finds in its own cache what it wrote in the layer
// before. NOTES.md#threads.
inline Plan in_parts(Plan plan, const Problem& problem, int64_t parts) {
  const Shape& shape = problem.shape;
  if (plan.batch_splits > 1 || shape.layout != Layout::channels_first || shape.S == 1) return plan;
  const int64_t samples = ceil_div(shape.N, smaller(parts, shape.N));
  // Smaller parts are not worth loading the coefficients of a row for each (4 rows: 20-60 % slower).
  constexpr int64_t worth_bytes = 256 << 10, fewest_rows = 8;
  if (shape.elements() * size_of(problem.dtype) < worth_bytes) return plan;
  if (plan.pattern == AccessPattern::columns && samples < fewest_rows) return plan;
  (plan.pattern == AccessPattern::rows ? plan.split_samples : plan.split_rows) = samples;
  plan.batch_splits = ceil_div(shape.N, samples);
  return plan;
}

}  // namespace fastbn::cpu
