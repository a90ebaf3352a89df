// In: the instruction sets that kernels.h was compiled for. Out: the table that backend.cpp chooses from.
#pragma once

#include "../core/problem.h"

// Sets wider than what every processor has. Not for the emulator: that build is about the CUDA kernels, and is there
// sooner so.
#if defined(__x86_64__) && !defined(FASTBN_SIMT)
#define FASTBN_WIDER_SETS
#endif

namespace fastbn::cpu {

// In the workspace, arrays of so many coefficients for each channel.
constexpr int coefficients = 5;

// Where the tensors of a pass have more bytes together, its outputs go past the last-level cache. `alone`: of a pass
// with no other before or behind it.
int64_t cached_bytes(bool alone);

#define FASTBN_DECLARE(name)               \
  namespace name {                         \
  void run_forward(const Forward& args);   \
  void run_backward(const Backward& args); \
  }
FASTBN_DECLARE(baseline)
FASTBN_DECLARE(avx2)
FASTBN_DECLARE(avx512)
#undef FASTBN_DECLARE

}  // namespace fastbn::cpu
