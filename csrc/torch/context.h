// Where a call runs: device guard, stream and memory. Three builds: CPU only, with CUDA (FASTBN_CUDA), and the
// emulator, which runs the CUDA kernels on the CPU for tests (FASTBN_SIMT).
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "../cpu/backend.h"
#include "../cuda/backend.h"
#include "../runtime/page_cache.h"

#if defined(FASTBN_CUDA)
#include <c10/cuda/CUDAGuard.h>
#endif
#if defined(FASTBN_CUDA) || defined(FASTBN_SIMT)
#define FASTBN_GPU  // namespace cuda is available
#endif

namespace fastbn {

using at::Tensor;

// Whether this build has kernels for the device.
inline bool has_kernels(const at::Device& device) {
#if defined(FASTBN_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

// The context of a call. All memory is allocated on the current stream of the input's device, where all kernels run, so
// torch's allocator may reuse it as soon as the call returns. The same holds for the backward pass: autograd runs a
// node on the stream of its forward pass.
class Context {
 public:
  explicit Context(const Tensor& input);

  // Whether the CUDA kernels are used.
  bool on_gpu() const { return gpu_; }
#if defined(FASTBN_GPU)
  // With the counters of a plan. If they belong to this call alone they are zeroed by a launch, for no more than it
  // uses.
  cuda::Stream stream_for(const cuda::Plan& plan);
  cuda::Stream stream() const { return {handle_, nullptr, nullptr}; }
#endif

  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const;
  Tensor empty_like(const Tensor& t, at::MemoryFormat format) const;

 private:
  const bool gpu_;
  void* handle_ = nullptr;
#if defined(FASTBN_CUDA)
  const at::Device device_;
  c10::cuda::OptionalCUDAGuard guard_;
  Tensor counters_;  // if they belong to this call alone
#endif
};

// Calls allocate(), and once more after trimming the page cache if memory is out.
template <class Allocate>
Tensor with_kept_memory(const Allocate& allocate) {
  try {
    return allocate();
  } catch (const c10::Error&) {
    if (!page_cache::trim()) throw;
    return allocate();
  }
}

}  // namespace fastbn
