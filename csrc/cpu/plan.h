// In: a Problem. Out: how the CPU kernels walk it. Pure, and where there are sums blind to the number of threads: the
// same tensor is cut in the same places on every machine, which is why its results have the same bits.
#pragma once

#include "../core/problem.h"

namespace fastbn::cpu {

enum class Walk : uint8_t {
  runs,     // channels_first, wide maps: a channel is N runs of S contiguous values
  columns,  // a matrix whose columns belong to channels: channels_last, (N, C), and small maps
};

struct Plan {
  Walk walk;
  int64_t items;             // pieces of the channel axis; each is whole channels
  int64_t channels_an_item;  // the last one may have fewer
  int64_t segments;          // pieces of each item along the batch; 1: an item is done while it is in cache
  // columns only: the tensor as a matrix [rows, columns], plus spare elements that fill no row
  int64_t rows, columns, spare;
  int64_t columns_a_channel;  // neighbouring columns of one channel (S, or 1)
  int64_t segment_rows;       // rows in a segment
  // runs only: a segment is some samples, or, where there are fewer samples than segments, a part of a map
  int64_t segment_samples, segment_positions;
  int64_t positions;  // runs only: in a map

  // Elements from an input to its like in the next item.
  int64_t item_width() const { return channels_an_item * (walk == Walk::runs ? positions : columns_a_channel); }
  // runs: parts of a map
  int64_t parts() const { return ceil_div(positions, segment_positions); }
  // A mask has a slot for each pack of `size` elements that is taken, numbered along rows: those of an item (columns),
  // the parts of maps (runs). An item has a last row for spare elements.
  int64_t slot_rows() const { return rows + (spare > 0); }
  int64_t slots_a_row(int64_t size) const {
    if (walk == Walk::runs) return ceil_div(segment_positions, size);
    return ceil_div(items == 1 ? columns : channels_an_item * columns_a_channel, size);
  }
  int64_t slots(int64_t size, const Shape& shape) const {
    return (walk == Walk::runs ? shape.N * shape.C * parts() : items * slot_rows()) * slots_a_row(size);
  }
};

// Widest tile of columns: 96 KB of sums and coefficients, which the second-level cache holds.
constexpr int64_t max_columns = 4096;

// Elements from one array of coefficients to the next: whole lines, and one more, because arrays a multiple of 4 KiB
// apart would want the same few places of the first-level cache, which rows of as many channels want as well.
constexpr int64_t padded_channels(int64_t channels) { return round_up(channels, 16) + 16; }

// How many channels of small maps make a row of whole cache lines, 4 to 8 KB long.
inline int64_t channels_a_row(int64_t map_bytes, int64_t positions) {
  constexpr int64_t line = 64;
  int64_t group = 1;
  while (group * map_bytes % line != 0) group *= 2;
  while (group * map_bytes < (4 << 10)) group *= 2;
  while (group > 1 && group * positions > max_columns) group /= 2;
  return group;
}

inline Plan make_plan(const Problem& problem) {
  const Shape& shape = problem.shape;
  const int64_t item_size = size_of(problem.dtype);
  constexpr int64_t line = 64;
  // Half of a 512 KB second-level cache, the smallest of current x86 servers.
  constexpr int64_t cache = 256 << 10;
  constexpr int64_t enough_items = 32;
  Plan plan{};
  plan.columns_a_channel = 1;

  const bool first = shape.layout == Layout::channels_first;
  // Shorter runs end before the processor's prefetcher has understood them: of 28x28 and 14x14 maps several
  // channels together, as columns, took 0.6 to 0.9 of the time that they took as runs.
  constexpr int64_t shortest_run = 4000;
  // Nor as runs where it takes several to fill whole lines: ends that share a line cannot be written past the cache
  // (1000 float32: 0.67 to 0.95 of the time as columns).
  const int64_t map_bytes = shape.S * item_size;
  const int64_t group = first && shape.S > 1 ? smaller(shape.C, channels_a_row(map_bytes, shape.S)) : 1;
  const bool ragged = map_bytes % line != 0 && group * map_bytes % line == 0;
  if (first && map_bytes >= shortest_run && !ragged) {
    plan.walk = Walk::runs;
    plan.positions = shape.S;
    plan.channels_an_item = 1;
    plan.items = shape.C;
    const bool split = plan.items < enough_items && shape.elements() * item_size > cache;
    const int64_t wanted = split ? ceil_div(enough_items, plan.items) : 1;
    constexpr int64_t fewest_positions = 4096;
    const int64_t parts = larger<int64_t>(1, smaller(wanted / shape.N, shape.S / fewest_positions));
    plan.segment_samples = parts > 1 ? 1 : ceil_div(shape.N, smaller(wanted, shape.N));
    plan.segment_positions = ceil_div(shape.S, parts);
    plan.segments = ceil_div(shape.N, plan.segment_samples) * parts;
    return plan;
  }

  plan.walk = Walk::columns;
  if (first && shape.S > 1) {
    plan.rows = shape.N;
    plan.columns = shape.C * shape.S;
    plan.columns_a_channel = shape.S;
    plan.channels_an_item = group;
  } else {
    const int64_t rows = shape.N * shape.S;
    plan.rows = rows;
    plan.columns = shape.C;
    plan.channels_an_item = smaller(shape.C, max_columns);
    // Few channels: k rows make one, so that vectors are full and lines are whole.
    int64_t k = 1;
    const auto wanting = [&](int64_t bytes) { return bytes < 512 || (bytes % line != 0 && bytes < 2048); };
    while (shape.C * item_size < 512 && k * 2 <= rows && wanting(shape.C * k * item_size)) k *= 2;
    plan.columns = shape.C * k;
    plan.rows = rows / k;
    plan.spare = (rows % k) * shape.C;
  }
  plan.items = ceil_div(shape.C, plan.channels_an_item);
  const int64_t width = plan.items == 1 ? plan.columns : plan.item_width();  // folded rows are one item's
  const int64_t tile_bytes = plan.rows * width * item_size;
  plan.segments = 1;
  plan.segment_rows = plan.rows;
  if (tile_bytes > cache) {
    // Fewer bytes would not be worth the sums that each segment begins and ends with.
    constexpr int64_t fewest_rows = 64, most_segments = 64;
    plan.segment_rows =
        larger(larger(fewest_rows, ceil_div(cache * plan.rows, tile_bytes)), ceil_div(plan.rows, most_segments));
    // Where they are few, as many for each of 2, 4 or 8 threads (0.78 of the time at 1.6 MB); rows are taken four at
    // once.
    const int64_t segments = ceil_div(plan.rows, plan.segment_rows);
    if (segments <= 16) {
      plan.segment_rows = round_up(ceil_div(plan.rows, round_up(segments, segments > 4 ? 8 : 2)), 4);
    }
    plan.segments = ceil_div(plan.rows, plan.segment_rows);
  }
  return plan;
}

// For a pass without sums over contiguous maps: by samples instead of by channels, a part for each thread, as the
// layers around batch norm go through memory. So a thread finds in its own cache what it wrote in the layer before.
inline Plan in_parts(Plan plan, const Problem& problem, int64_t parts) {
  const Shape& shape = problem.shape;
  if (plan.segments > 1 || shape.layout != Layout::channels_first || shape.S == 1) return plan;
  const int64_t samples = ceil_div(shape.N, smaller(parts, shape.N));
  // Less is not worth what each part begins with: columns, the coefficients of a row (4 rows 1.2 to 1.6 of the time).
  constexpr int64_t worth_bytes = 256 << 10, fewest_rows = 8;
  if (shape.elements() * size_of(problem.dtype) < worth_bytes) return plan;
  if (plan.walk == Walk::columns && samples < fewest_rows) return plan;
  (plan.walk == Walk::runs ? plan.segment_samples : plan.segment_rows) = samples;
  plan.segments = ceil_div(shape.N, samples);
  return plan;
}

}  // namespace fastbn::cpu
