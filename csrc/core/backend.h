// The interface of both backends: the passes of batch norm on plain data.
#pragma once

#include "problem.h"

namespace fastbn::cpu {

// Size of the workspace of forward and backward (64-byte aligned).
int64_t workspace_bytes(const Problem& problem);

// Size of the mask that forward may fill for backward.
int64_t mask_bytes(const Problem& problem);

// Training: the moments of the batch, then the output (unless it is nullptr). Eval: the output from the given moments.
void forward(const Forward& args);

// Gradients of input, residual, weight and bias.
void backward(const Backward& args);

// The instruction set of the kernels that run: baseline, avx2 or avx512.
const char* capability();

// The widest one that this processor supports; FASTBN_CPU_CAPABILITY can only lower it.
const char* capability_of_processor();

}  // namespace fastbn::cpu

namespace fastbn::cuda {

enum class Pass : uint8_t { forward, backward };

// The stream to launch on, on the current device. The counters are counter_bytes of zeros before the first launch, and
// every launch leaves them ready for the next one. Launches that may run concurrently must not share them.
struct Stream {
  void* handle;  // a cudaStream_t
  unsigned* counters;
};

constexpr int64_t counter_bytes = 64 << 10;

// Size of the workspace in device memory (256-byte aligned, uninitialized).
int64_t workspace_bytes(const Problem& problem, Pass pass, bool training);

// As for the CPU; 0 if the kernels make no mask. With a mask, all tensors of a call have to be 16-byte aligned.
int64_t mask_bytes(const Problem& problem);

// As for the CPU. Both launch kernels and return; a failed launch is a std::runtime_error.
void forward(const Forward& args, const Stream& stream);
void backward(const Backward& args, const Stream& stream);

// Updates running statistics of C channels with moments [2, C] of `count` values each.
void update_running_stats(const double* moments, int64_t channels, double count, const Running& running,
                          const Stream& stream);

// Merges BatchStats (mean, variance, count) of K ranks, [K, 3, C], into batch_stats [3, C], and updates running
// statistics with it.
void gather_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, const Running& running,
                  const Stream& stream);

}  // namespace fastbn::cuda
