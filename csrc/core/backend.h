// In: plain-data arguments. Out: the primitives, declared with the same names for each backend.
#pragma once

#include "problem.h"

namespace fastbn::cpu {

// Bytes of scratch that forward and backward want behind their workspace pointer (64-byte aligned).
int64_t workspace_bytes(const Problem& problem);

// Training: moments of the batch, then the output. Eval: the output from the moments given.
void forward(const Forward& args);

// Gradients of input, and the sums that are those of weight and bias.
void backward(const Backward& args);

// The name of the instruction set that the kernels run with: baseline, avx2 or avx512.
const char* capability();

// The widest that this processor runs; FASTBN_CPU_CAPABILITY can only lower it.
const char* capability_of_processor();

}  // namespace fastbn::cpu
