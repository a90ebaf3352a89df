// In: the input of a call. Out: where its kernels run: the device made current, its stream, memory on it. Three builds:
// for the CPU alone, with CUDA (FASTBN_CUDA), and one that runs the CUDA kernels on the CPU, for tests (FASTBN_SIMT).
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "../core/backend.h"
#include "../runtime/page_cache.h"

#if defined(FASTBN_CUDA)
#include <c10/cuda/CUDAGuard.h>
#endif
#if defined(FASTBN_CUDA) || defined(FASTBN_SIMT)
#define FASTBN_GPU  // the primitives of namespace cuda are there
#endif

namespace fastbn {

using at::Tensor;

// True if this build has kernels for tensors of that device.
inline bool has_kernels(const at::Device& device) {
#if defined(FASTBN_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

// For the time of a call. All memory comes from the current stream of the input's device and all kernels run on it, so
// that torch's allocator may give the memory to the next in that stream as soon as the call returns. That goes for the
// backward pass too: autograd runs a node on the stream that its forward pass ran on.
class Context {
 public:
  explicit Context(const Tensor& input);

  // True if the CUDA kernels are to be used.
  bool on_gpu() const { return gpu_; }
#if defined(FASTBN_GPU)
  // For launches in which blocks wait for each other, and for those in which they do not.
  cuda::Stream stream_with_counters();
  cuda::Stream stream() const { return {handle_, nullptr}; }
#endif

  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const;
  Tensor empty_like(const Tensor& t, at::MemoryFormat format) const;

 private:
  const bool gpu_;
  void* handle_ = nullptr;
#if defined(FASTBN_CUDA)
  const at::Device device_;
  c10::cuda::OptionalCUDAGuard guard_;
  Tensor counters_;  // where they are of this call alone
#endif
};

// allocate(), and once more with the memory of the page cache where torch's allocator has none left.
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
