// The interface of the CUDA backend: the passes of batch norm on plain data, on the current device.
#pragma once

#include "plan.h"

namespace fastbn::cuda {

// The stream to launch on, and as many barriers and tickets as the plan says, of barrier_bytes each: zeros before the
// first launch. Every launch leaves them ready for the next one. Launches that may run concurrently must not share
// them.
struct Stream {
  void* handle;  // a cudaStream_t
  unsigned *barriers, *tickets;
};

// The plan of a pass, whose workspace and mask may still be missing; all other pointers count, by their alignment and
// by what is absent. Plans are cached, so that only the first call of a kind queries the device.
Plan plan(const Forward& args);
Plan plan(const Backward& args);

// As for the CPU; the workspace is 256-byte aligned and uninitialized. Both launch kernels and return; a failed launch
// is a std::runtime_error. Where other programs leave no room for a cooperative launch, they launch the kernels of a
// plan without one, for which the workspace is large enough, and so do all later calls of the kind.
void forward(const Plan& plan, const Forward& args, const Stream& stream);
void backward(const Plan& plan, const Backward& args, const Stream& stream);

// Updates running statistics of C channels with moments [2, C] of `count` values each.
void update_running_stats(const double* moments, int64_t channels, double count, const Running& running,
                          const Stream& stream);

// Merges BatchStats (mean, variance, count) of K ranks, [K, 3, C], into batch_stats [3, C], and updates running
// statistics with it.
void gather_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, const Running& running,
                  const Stream& stream);

}  // namespace fastbn::cuda
