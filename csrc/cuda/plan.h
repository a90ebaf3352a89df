// In: a Problem and what is known of a GPU. Out: how the CUDA kernels walk it. Pure host code without a CUDA header:
// tested for GPUs that nobody here has.
#pragma once

#include "../core/backend.h"
#include "../core/problem.h"

namespace fastbn::cuda {

// Of every kernel; launch bounds hold the compiler to it, and four blocks of it fill a multiprocessor's registers.
constexpr int64_t threads_a_block = 256;
constexpr int64_t registers_a_thread = 64;
// Counters of barriers have a sector of memory each.
constexpr int64_t barrier_bytes = 32;

enum class Strategy : uint8_t {
  streaming,  // sums in one launch, the output in the next, which reads the input again
  resident,   // one launch: an item stays in the shared memory of its blocks between its sums and its output
};

enum class Walk : uint8_t {
  rows,     // an item is one channel, N rows of S neighbouring values; a row may begin and end within a vector
  columns,  // an item is some neighbouring whole vectors of every row of the matrix [rows, columns]
};

struct Device {
  int64_t multiprocessors;
  int64_t shared_per_multiprocessor, shared_per_block;  // bytes, the latter as a kernel may opt in to
  int64_t shared_reserved;                              // bytes that the system takes of each block's
  int64_t registers_per_multiprocessor;
  int64_t threads_per_multiprocessor;
  bool cooperative;               // cooperative launches, which groups of several blocks need
  int64_t bytes_per_microsecond;  // of its memory, reads and writes together; 0: not known
};

struct Plan {
  Strategy strategy;
  Walk walk;
  int64_t vector;             // elements in one access: 16 bytes of them, or 1
  int64_t threads;            // in a block
  int64_t rows, columns;      // the tensor as a matrix: [N, C * S] or [N * S, C]
  int64_t columns_a_channel;  // S or 1
  int64_t items;              // pieces of the columns, each of whole channels
  int64_t channels_an_item;   // the last one may have fewer; at most threads_a_block
  int64_t vectors_a_row;      // of an item
  int64_t lanes_a_row;      // columns: neighbouring threads that share a row, a power of two of at least vectors_a_row
  int64_t blocks_an_item;   // that share its rows (columns) or its vectors (rows)
  int64_t groups;           // resident: items in work at the same time
  int64_t waves;            // resident: rounds of groups
  int64_t blocks;           // in the grid
  int64_t shared_bytes;     // dynamic shared memory of a block
  int64_t scratch_bytes;    // of that, for sums and coefficients; they come first
  int64_t slice_bytes;      // resident: of that, for one tensor's part of an item
  int64_t multiprocessors;  // of the device that the plan is for
  bool cooperative;
  int64_t stagger;  // resident: nanoseconds between the starts of the blocks of one multiprocessor

  int64_t workspace_bytes;
  int64_t bytes, least_bytes;  // that pass between the chip and memory in this pass; if each were read or written once
};

// aligned: every tensor begins at a multiple of 16 bytes.
Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device);

}  // namespace fastbn::cuda
