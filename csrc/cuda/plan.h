// The CUDA plan: strategy and geometry of a pass. Pure host code without CUDA headers, so that it is tested for GPUs
// that are not there.
#pragma once

#include "../core/problem.h"

namespace fastbn::cuda {

// Threads of every kernel and the registers that launch bounds limit them to: four blocks fill the register file of a
// multiprocessor.
constexpr int64_t threads_per_block = 256;
constexpr int64_t registers_per_thread = 64;
// Each barrier counter has a 32-byte sector of its own.
constexpr int64_t barrier_bytes = 32;

enum class Pass : uint8_t { forward, backward };

// Bytes of barrier counters and counters of finished blocks of a stream.
constexpr int64_t counter_bytes = 64 << 10;

enum class Strategy : uint8_t {
  streaming,  // sums in one launch, the output in the next, which reads the input again
  resident,   // one launch: a channel tile stays in the shared memory of its blocks between its sums and its output
};

enum class AccessPattern : uint8_t {
  rows,     // a channel tile is one channel, N rows of S neighbouring values; a row may begin and end within a vector
  columns,  // a channel tile is some neighbouring whole vectors of every row of the matrix [rows, columns]
};

struct Device {
  int64_t multiprocessors;
  int64_t shared_per_multiprocessor, shared_per_block;  // bytes; the latter with opt-in
  int64_t shared_reserved;                              // bytes of each block that the system reserves
  int64_t registers_per_multiprocessor;
  int64_t threads_per_multiprocessor;
  bool cooperative;               // supports cooperative launches, which barriers between blocks need
  int64_t bytes_per_microsecond;  // memory bandwidth, reads and writes together; 0: unknown
};

struct Plan {
  Strategy strategy;
  AccessPattern pattern;
  int64_t vector;               // elements in one access: 16 bytes of them, or 1
  int64_t threads;              // in a block
  int64_t rows, columns;        // the tensor as a matrix: [N, C * S] or [N * S, C]
  int64_t columns_per_channel;  // S or 1
  int64_t channel_tiles;        // tiles of the channel axis, each of whole channels
  int64_t channels_per_tile;    // the last one may have fewer; at most threads_per_block
  int64_t vectors_per_row;      // of a channel tile
  int64_t lanes_per_row;  // columns: neighbouring threads that share a row, a power of two of at least vectors_per_row
  int64_t batch_splits;   // blocks that share a channel tile: its rows (columns) or vectors (rows)
  int64_t groups;         // resident: channel tiles that are processed concurrently
  int64_t waves;          // resident: rounds of groups
  int64_t blocks;         // in the grid
  int64_t shared_bytes;   // dynamic shared memory of a block
  int64_t scratch_bytes;  // of that, the sums and coefficients at the start
  int64_t slice_bytes;    // resident: of that, one tensor's part of a channel tile
  int64_t multiprocessors;  // of the device that the plan is for
  bool cooperative;
  int64_t stagger;  // resident: nanoseconds between the starts of the blocks of one multiprocessor

  int64_t workspace_bytes;
  int64_t mask_bytes;          // of the mask that forward can fill for backward; 0: none
  int64_t bytes, least_bytes;  // DRAM traffic of this pass; if each tensor moved once
};

// aligned: every tensor begins at a multiple of 16 bytes.
Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device);

}  // namespace fastbn::cuda
