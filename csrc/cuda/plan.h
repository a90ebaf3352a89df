// The CUDA plan: strategy and geometry of a pass. Pure host code without CUDA headers, so that it is tested for GPUs
// that are not there.
#pragma once

#include "../core/problem.h"

namespace fastbn::cuda {

// Threads of the blocks of the streaming kernels.
constexpr int64_t streaming_threads = 256;
// Threads of the blocks of the resident kernels, and the registers that launch bounds limit them to: two blocks fill
// the register file of a multiprocessor. Half as many blocks as with 256 threads share a channel tile, so there is half
// as much to merge, and rows of 98 vectors (14x14 and 7x7 maps) leave 4 % of the threads idle instead of 23 %.
constexpr int64_t resident_threads = 512;
constexpr int64_t registers_per_thread = 64;
constexpr int64_t most_threads = resident_threads;
// Each barrier counter, and each ticket, has a 32-byte sector of its own.
constexpr int64_t barrier_bytes = 32;

enum class Pass : uint8_t { forward, backward };

// Bytes of the counters of a stream: barriers in the first half, tickets in the second.
constexpr int64_t counter_bytes = 256 << 10;

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
  int64_t cluster;                // blocks of the largest cluster that every GPU of this kind can launch; 1: none
  int64_t bytes_per_microsecond;  // memory bandwidth, reads and writes together; 0: unknown
  // Records that a block reads at once; of more, those of subgroups are merged first, which costs three round trips
  // more. Assumed: 512 of them, in all blocks, take the second-level cache half as long (2 MB at 6 TB/s).
  int64_t merged_at_once = 512;
};

struct Plan {
  Strategy strategy;
  AccessPattern pattern;
  int64_t vector;               // elements in one access: 16 bytes of them, or 1
  int64_t threads;              // in a block
  int64_t rows, columns;        // the tensor as a matrix: [N, C * S] or [N * S, C]
  int64_t columns_per_channel;  // S or 1
  int64_t channel_tiles;        // tiles of the channel axis, each of whole channels
  int64_t channels_per_tile;    // the last one may have fewer; at most `threads`
  int64_t vectors_per_row;      // of a channel tile
  // columns: neighbouring threads that share a row: vectors_per_row of them where a channel fills a vector, or else a
  // power of two, whose sums are merged by shuffles
  int64_t lanes_per_row;
  int64_t batch_splits;     // blocks that share a channel tile: its rows (columns) or vectors (rows)
  int64_t subgroup;         // of these, how many are merged first: a cluster, or by the last of them; 1: all at once
  int64_t cluster;          // resident: blocks of a cluster, which read each other's shared memory; 1: none
  int64_t groups;           // resident: channel tiles that are processed concurrently
  int64_t waves;            // resident: rounds of groups
  int64_t blocks;           // in the grid
  int64_t shared_bytes;     // dynamic shared memory of a block
  int64_t scratch_bytes;    // of that, the sums and coefficients at the start
  int64_t staging_bytes;    // of those, through which a block reads the records of others
  int64_t slice_bytes;      // resident: of that, one tensor's part of a channel tile
  int64_t multiprocessors;  // of the device that the plan is for
  bool cooperative;
  int64_t stagger;  // resident: nanoseconds between the starts of the blocks of one multiprocessor

  int64_t barriers, tickets;  // counters that the launch uses, of barrier_bytes each

  int64_t workspace_bytes;
  int64_t mask_bytes;          // of the mask that forward can fill for backward; 0: none
  int64_t bytes, least_bytes;  // DRAM traffic of this pass; if each tensor moved once
};

// Columns: whether a channel is at least a vector wide, so that a vector has values of two channels at most.
inline bool spans_vectors(const Plan& plan) {
  return plan.columns_per_channel > 1 && plan.columns_per_channel >= plan.vector;
}

// Bytes of shared memory in which threads leave their sums for each other; see block_sums in reduce.cuh.
int64_t sums_bytes(const Plan& plan, DType dtype);

// aligned: every tensor begins at a multiple of 16 bytes.
Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device);

}  // namespace fastbn::cuda
