// The parts of a call: canonical layout, arguments, workspace and launch. Internal to ops.cpp, ghost.cpp and sync.cpp.
#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>

#include <variant>

#include "../core/dispatch.h"
#include "arguments.h"
#include "context.h"

namespace fastbn {

// A torch.profiler event with the lifetime of this object; make_inputs() is called only if a profiler listens.
// in_graph: autograd creates a node next, which the profiler connects with this event. Not RECORD_FUNCTION, which
// always constructs a RecordFunction and is noticeable in the smallest calls.
class ProfilerEvent {
 public:
  template <class MakeInputs>
  ProfilerEvent(const char* name, const MakeInputs& make_inputs, bool in_graph = false) {
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
    if (!callbacks) return;
    event_.emplace(std::move(*callbacks));
    const std::vector<c10::IValue> inputs = make_inputs();
    at::detail::record_function_with_scope(*event_, name, inputs,
                                           in_graph ? int64_t(at::sequence_number::peek()) : int64_t(-1));
  }

 private:
  std::optional<at::RecordFunction> event_;
};

DType dtype_of(const Tensor& t);

inline bool is_half(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

// checked_channels of tensors that kernels are about to read.
int64_t readable_channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, const Tensor* grad_output = nullptr);

// check_given of a tensor that kernels are about to read.
void check_readable_given(const Tensor& t, const char* name, c10::SymIntArrayRef sizes, const Tensor& input);

// The tensor in one of the two layouts that kernels support; copied if it is in neither.
struct Canonical {
  Tensor tensor;
  at::MemoryFormat format;
  Problem problem;
};

// t.contiguous(format), with with_kept_memory.
Tensor contiguous_in(const Tensor& t, at::MemoryFormat format);

Canonical canonicalize(const Tensor& input);

// The residual in the memory order of x.
const void* data_of(const OptionalTensor& residual, const Canonical& x, Tensor& keep);

Param param(const OptionalTensor& t, Tensor& keep);

// The workspace of a call: on the stack if small, else from torch's allocator, or from the page cache from 64 KB on,
// because freeing such a block makes the C library trim its heap (NOTES.md#heap-trimming).
class Scratch {
 public:
  Scratch(const Context& context, int64_t bytes) {
    constexpr int64_t least_trimming = 64 << 10;
    if (!context.on_gpu() && bytes >= least_trimming) pages_ = page_cache::acquire(bytes), bytes_ = bytes;
    if (pages_ == nullptr && bytes > (context.on_gpu() ? 0 : int64_t(sizeof(small_)))) {
      large_ = context.empty({bytes}, at::kByte);
    }
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (pages_ != nullptr) page_cache::release(pages_, bytes_);
  }
  void* data() { return pages_ != nullptr ? pages_ : large_.defined() ? large_.data_ptr() : small_; }

 private:
  alignas(64) char small_[4096];
  Tensor large_;
  void* pages_ = nullptr;
  int64_t bytes_ = 0;
};

// Gradients of weight and bias, [2, C], and counts, [C], of a batch of which the input is a part.
struct GlobalSums {
  const double *sums = nullptr, *counts = nullptr;
};

// `backward` with valid arguments. dtype: of the gradients of weight and bias.
Gradients run_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                       std::array<bool, 4> wanted, const EpilogueArgs& epilogue, bool may_overwrite,
                       const GlobalSums& global, at::ScalarType dtype);

// The plan of a pass on the device of a call: made once, with the bytes to allocate.
struct PassPlan {
  std::variant<cpu::Plan, cuda::Plan> plan;
  int64_t workspace_bytes, mask_bytes;
};

// args: complete but for workspace and mask.
PassPlan plan(const Context& context, const Forward& args);
PassPlan plan(const Context& context, const Backward& args);

void launch(Context& context, const PassPlan& plan, const Forward& args);
void launch(Context& context, const PassPlan& plan, const Backward& args);

// Whether data is aligned for masks; other tensors are copied.
bool on_vector(const void* data);

void bump_version(const Tensor& t);

// Adds to a counter, atomically on the CPU; torch's += would be a kernel of its own in every forward pass.
void count_batches(const Tensor& counter, int64_t number);

// Running statistics as kernels update them: C contiguous values; others are copied and written back.
class RunningArgument {
 public:
  RunningArgument(const Statistics& statistics, const Context& context) {
    if (!present(statistics.mean)) return;
    running_.mean = take(*statistics.mean, 0);
    running_.var = take(*statistics.var, 1);
    if (statistics.momentum) {
      running_.momentum = *statistics.momentum;
    } else if (present(statistics.batches)) {
      set_cumulative(*statistics.batches, context);
    }
  }

  const Running& get() const { return running_; }

  // Call after the launch.
  void store() {
    for (int i = 0; i < 2; ++i) {
      if (target_[i] == nullptr) continue;
      if (copy_[i].defined()) {
        at::AutoDispatchBelowADInplaceOrView guard;
        target_[i]->copy_(copy_[i]);
      }
      bump_version(*target_[i]);
    }
  }

 private:
  Output take(const Tensor& t, int i) {
    target_[i] = &t;
    if (!t.is_contiguous()) copy_[i] = t.contiguous();
    return {(copy_[i].defined() ? copy_[i] : t).data_ptr(), dtype_of(t)};
  }

  // A counter on the GPU is read by the kernel: reading it here would synchronize with the device.
  void set_cumulative(const Tensor& batches, const Context& context) {
    TORCH_CHECK(batches.numel() == 1, "num_batches_tracked should contain 1 element not ", batches.numel());
    if (context.on_gpu() && batches.device() == target_[0]->device()) {
      batches_ = batches.to(at::kLong);
      running_.batches = batches_.const_data_ptr<int64_t>();
    } else {
      running_.momentum = 1.0 / batches.item<double>();
    }
  }

  Running running_{};
  const Tensor* target_[2] = {};
  Tensor copy_[2], batches_;
};

// Checks the statistics of an operator that updates them with `other`, [..., C]; returns C.
int64_t checked_statistics(const Statistics& statistics, const Tensor& other, const char* other_name);

}  // namespace fastbn
