// The device, stream, barrier counters and memory of a call.
#include "context.h"

#include <c10/core/CPUAllocator.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#if defined(FASTBN_CUDA)
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>
#endif

namespace fastbn {

namespace {

// The allocator of outputs of page_cache::min_bytes and more.
struct CachedAllocator final : c10::Allocator {
  struct Block {
    void* data;
    int64_t bytes;
  };
  static void free(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    page_cache::release(block->data, block->bytes);
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Block{page_cache::acquire(int64_t(bytes)), int64_t(bytes)});
    // torch's own allocator tries again and raises the error that programs expect.
    if (block->data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block->data, bytes);
    void* const data = block->data;
    return {data, block.release(), &free, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

CachedAllocator* const cached_allocator = new CachedAllocator;  // outlives every tensor

#if defined(FASTBN_CUDA)

// Checks once per device that it has the memory model that barriers need.
void check_capability(int device) {
  static std::atomic<uint64_t> checked{0};
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (checked.load(std::memory_order_relaxed) & bit) return;
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  TORCH_CHECK(major >= 7, "fastbn: cuda:", device, " has compute capability ", major, ".", minor,
              ", and fastbn's kernels need 7.0 or later. Use torch.nn's batch norm there.");
  checked.fetch_or(bit, std::memory_order_relaxed);
}

Tensor zeroed_counters(const c10::cuda::CUDAStream& stream, int64_t bytes) {
  Tensor t = at::detail::empty_cuda({bytes}, at::kByte, stream.device(), std::nullopt);
  C10_CUDA_CHECK(cudaMemsetAsync(t.data_ptr(), 0, size_t(bytes), stream.stream()));
  return t;
}

// A captured graph may be replayed concurrently with anything. A stream that torch did not create may be destroyed, and
// another one may get its handle while the last kernel still runs; or it is cudaStreamPerThread, one handle for many
// streams.
bool needs_own_counters(const c10::cuda::CUDAStream& stream) {
  const cudaStream_t handle = stream.stream();
  if (handle == nullptr) return false;  // the default stream cannot be captured
  if (stream.id() == c10::StreamId(reinterpret_cast<intptr_t>(handle))) return true;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(handle, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The counters of a stream, allocated once because zeroing them is a launch.
Tensor kept_counters(const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static auto* const kept = new std::map<std::pair<int, c10::StreamId>, Tensor>;  // outlives every stream
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& t = (*kept)[{stream.device_index(), stream.id()}];
  if (!t.defined()) t = zeroed_counters(stream, cuda::counter_bytes);
  return t;
}

#endif

}  // namespace

#if defined(FASTBN_CUDA)

Context::Context(const Tensor& input) : gpu_(input.is_cuda()), device_(input.device()) {
  if (!gpu_) return;
  guard_.set_device(device_);
  check_capability(device_.index());
  handle_ = c10::cuda::getCurrentCUDAStream(device_.index()).stream();
}

cuda::Stream Context::stream_for(const cuda::Plan& plan) {
  if (plan.barriers + plan.tickets == 0) return stream();
  const auto stream = c10::cuda::getCurrentCUDAStream(device_.index());
  const bool own = needs_own_counters(stream);
  const int64_t tickets = own ? plan.barriers * cuda::barrier_bytes : cuda::counter_bytes / 2;
  counters_ = own ? zeroed_counters(stream, tickets + plan.tickets * cuda::barrier_bytes) : kept_counters(stream);
  unsigned* const counters = static_cast<unsigned*>(counters_.data_ptr());
  return {handle_, counters, counters + tickets / int64_t(sizeof(unsigned))};
}

#elif defined(FASTBN_SIMT)

Context::Context(const Tensor&) : gpu_(true) {}

cuda::Stream Context::stream_for(const cuda::Plan& plan) {
  if (plan.barriers + plan.tickets == 0) return stream();
  constexpr size_t half = cuda::counter_bytes / 2 / sizeof(unsigned);
  alignas(256) thread_local unsigned counters[2 * half] = {};
  return {nullptr, counters, counters + half};
}

#else

Context::Context(const Tensor&) : gpu_(false) {}

#endif

// Not at::empty: for a known device the dispatcher costs more than the allocation.
Tensor Context::empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
#if defined(FASTBN_CUDA)
  if (gpu_) return at::detail::empty_cuda(sizes, dtype, device_, std::nullopt);
#endif
  return with_kept_memory([&] { return at::detail::empty_cpu(sizes, dtype); });
}

Tensor Context::empty_like(const Tensor& t, at::MemoryFormat format) const {
#if defined(FASTBN_CUDA)
  if (gpu_) return at::detail::empty_cuda(t.sizes(), t.scalar_type(), device_, format);
#endif
  if (int64_t(t.nbytes()) < page_cache::min_bytes)
    return at::detail::empty_cpu(t.sizes(), t.scalar_type(), false, format);
  return at::detail::empty_generic(t.sizes(), cached_allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   t.scalar_type(), format);
}

}  // namespace fastbn
