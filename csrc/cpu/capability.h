// The kernels of each instruction set, which backend.cpp chooses from.
#pragma once

#include "plan.h"

// Instruction sets beyond the baseline. Builds that test something else compile faster without them.
#if defined(__x86_64__) && !defined(FASTBN_BASELINE)
#define FASTBN_WIDER_SETS
#endif

namespace fastbn::cpu {

// Arrays of per-channel coefficients in the workspace.
constexpr int coefficients = 5;

// If the tensors of a pass have more bytes than this together, its outputs use streaming stores. `alone`: no other pass
// reads or writes them around it.
int64_t cached_bytes(bool alone);

#define FASTBN_DECLARE(name)                                 \
  namespace name {                                           \
  void run_forward(const Plan& plan, const Forward& args);   \
  void run_backward(const Plan& plan, const Backward& args); \
  }
FASTBN_DECLARE(baseline)
FASTBN_DECLARE(avx2)
FASTBN_DECLARE(avx512)
#undef FASTBN_DECLARE

}  // namespace fastbn::cpu
