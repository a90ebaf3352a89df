// In: plain-data arguments. Out: the primitives, declared with the same names for each backend.
#pragma once

#include "problem.h"

namespace fastbn::cpu {

// Bytes of scratch that forward and backward want behind their workspace pointer (64-byte aligned).
int64_t workspace_bytes(const Problem& problem);

// Bytes of the mask that forward may fill for backward.
int64_t mask_bytes(const Problem& problem);

// Training: moments of the batch, then the output (if there is one). Eval: the output from the moments given.
void forward(const Forward& args);

// Gradients of input and residual, and the sums that are those of weight and bias.
void backward(const Backward& args);

// The name of the instruction set that the kernels run with: baseline, avx2 or avx512.
const char* capability();

// The widest that this processor runs; FASTBN_CPU_CAPABILITY can only lower it.
const char* capability_of_processor();

}  // namespace fastbn::cpu

namespace fastbn::cuda {

enum class Pass : uint8_t { forward, backward };

// Where to launch, on the current device. The counters are counter_bytes of zeros before the first launch, and every
// launch leaves them fit for the next; two launches that may run at the same time must not share them.
struct Stream {
  void* handle;  // a cudaStream_t
  unsigned* counters;
};

constexpr int64_t counter_bytes = 64 << 10;

// Bytes of device memory that forward or backward want behind their workspace pointer (256-byte aligned, any content).
int64_t workspace_bytes(const Problem& problem, Pass pass, bool training);

// As for the CPU; 0 where the kernels make no mask. All tensors that forward and backward are given together with one
// begin at multiples of 16 bytes.
int64_t mask_bytes(const Problem& problem);

// As for the CPU. They launch kernels and return; a launch that fails is a std::runtime_error.
void forward(const Forward& args, const Stream& stream);
void backward(const Backward& args, const Stream& stream);

// running statistics of C channels from moments [2, C] of count values each.
void update_running_stats(const double* moments, int64_t channels, double count, const Running& running,
                          const Stream& stream);

// A packet [3, C] (mean, variance, count) of all packets [K, 3, C], and running statistics from it.
void finish(const double* packets, int64_t K, int64_t channels, double* packet, const Running& running,
            const Stream& stream);

}  // namespace fastbn::cuda
