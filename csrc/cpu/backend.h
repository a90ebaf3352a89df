// The interface of the CPU backend: the passes of batch norm on plain data.
#pragma once

#include "plan.h"

namespace fastbn::cpu {

// The plan of the passes of a problem, forward and backward.
Plan plan(const Problem& problem);

// Training: the moments of the batch, then the output (unless it is nullptr). Eval: the output from the given moments.
// The workspace is 64-byte aligned.
void forward(const Plan& plan, const Forward& args);

// Gradients of input, residual, weight and bias.
void backward(const Plan& plan, const Backward& args);

// The instruction set of the kernels that run: baseline, avx2 or avx512.
const char* capability();

// The widest one that this processor supports; FASTBN_CPU_CAPABILITY can only lower it.
const char* capability_of_processor();

}  // namespace fastbn::cpu
