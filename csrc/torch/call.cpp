// Canonical layouts and launches.
#include "call.h"

#include <ATen/EmptyTensor.h>

#if defined(FASTBN_SIMT)
#include <mutex>
#endif

namespace fastbn {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", t.scalar_type(), "'");
  }
}

at::ScalarType param_dtype(at::ScalarType input, std::optional<at::ScalarType> weight) {
  return weight.value_or(is_half(input) ? at::kFloat : input);
}

at::ScalarType param_dtype(const Tensor& input, const OptionalTensor& weight) {
  return param_dtype(input.scalar_type(), present(weight) ? std::optional(weight->scalar_type()) : std::nullopt);
}

int64_t readable_channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, const Tensor* grad_output) {
  check_readable(input, "input");
  const int64_t channels = checked_channels(input, weight, bias, residual, grad_output).expect_int();
  if (grad_output != nullptr) check_memory(*grad_output, "grad_output");
  if (present(weight)) check_memory(*weight, "weight");
  if (present(bias)) check_memory(*bias, "bias");
  if (present(residual)) check_memory(*residual, "residual");
  return channels;
}

void check_readable_given(const Tensor& t, const char* name, c10::SymIntArrayRef sizes, const Tensor& input) {
  check_given(t, name, sizes, input);
  check_memory(t, name);
}

Tensor contiguous_in(const Tensor& t, at::MemoryFormat format) {
  return with_kept_memory([&] { return t.contiguous(format); });
}

Canonical canonicalize(const Tensor& input) {
  Canonical f;
  f.format = output_format(input);
  f.tensor = contiguous_in(input, f.format);
  const int64_t channels = input.size(1);
  const int64_t samples = input.size(0);
  f.problem.dtype = dtype_of(input);
  f.problem.shape = {samples, channels, input.numel() / (samples * channels),
                     f.format == at::MemoryFormat::Contiguous ? Layout::channels_first : Layout::channels_last};
  return f;
}

at::MemoryFormat gradient_format(at::MemoryFormat format, const Tensor& input) {
  return format == at::MemoryFormat::Contiguous ? input.suggest_memory_format() : format;
}

const void* data_of(const OptionalTensor& residual, const Canonical& x, Tensor& keep) {
  if (!present(residual)) return nullptr;
  keep = contiguous_in(*residual, x.format);
  return keep.const_data_ptr();
}

Param param(const OptionalTensor& t, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::f32};
  const Tensor& row = t->is_contiguous() ? *t : (keep = t->contiguous());
  return {row.const_data_ptr(), dtype_of(row)};
}

bool on_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

namespace {

#if defined(FASTBN_SIMT)
// The emulator runs one kernel at a time.
std::mutex& emulator() {
  static std::mutex mutex;
  return mutex;
}
#endif

template <class Args>
PassPlan plan_pass([[maybe_unused]] const Context& context, const Args& args) {
  const auto with_bytes = [](const auto& p) { return PassPlan{p, p.workspace_bytes, p.mask_bytes}; };
#if defined(FASTBN_GPU)
  if (context.on_gpu()) return with_bytes(cuda::plan(args));
#endif
  return with_bytes(cpu::plan(args.problem));
}

}  // namespace

PassPlan plan(const Context& context, const Forward& args) { return plan_pass(context, args); }
PassPlan plan(const Context& context, const Backward& args) { return plan_pass(context, args); }

void launch([[maybe_unused]] Context& context, const PassPlan& plan, const Forward& args) {
#if defined(FASTBN_SIMT)
  const std::lock_guard<std::mutex> lock(emulator());
#endif
#if defined(FASTBN_GPU)
  if (const auto* const on_gpu = std::get_if<cuda::Plan>(&plan.plan)) {
    return cuda::forward(*on_gpu, args, context.stream_for(*on_gpu));
  }
#endif
  cpu::forward(std::get<cpu::Plan>(plan.plan), args);
}

void launch([[maybe_unused]] Context& context, const PassPlan& plan, const Backward& args) {
#if defined(FASTBN_SIMT)
  const std::lock_guard<std::mutex> lock(emulator());
#endif
#if defined(FASTBN_GPU)
  if (const auto* const on_gpu = std::get_if<cuda::Plan>(&plan.plan)) {
    return cuda::backward(*on_gpu, args, context.stream_for(*on_gpu));
  }
#endif
  cpu::backward(std::get<cpu::Plan>(plan.plan), args);
}

void bump_version(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void count_batches(const Tensor& counter, int64_t number) {
  if (counter.is_cpu() && counter.scalar_type() == at::kLong) {
    __atomic_fetch_add(counter.data_ptr<int64_t>(), number, __ATOMIC_RELAXED);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    counter.add_(number);
  }
  bump_version(counter);
}

int64_t checked_statistics(const Statistics& statistics, const Tensor& other, const char* other_name) {
  const int64_t channels = other.size(-1);
  check_running(statistics, channels, other, other_name);
  if (present(statistics.mean)) {
    check_memory(*statistics.mean, "running_mean");
    check_memory(*statistics.var, "running_var");
  }
  if (present(statistics.batches)) {
    const Tensor& t = *statistics.batches;
    if (t.layout() == at::kStrided && has_kernels(t.device())) check_memory(t, "num_batches_tracked");
  }
  return channels;
}

at::MemoryFormat output_format(const Tensor& input) {
  for (const auto format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    if (input.is_contiguous(format)) return format;
  }
  return input.suggest_memory_format();
}

}  // namespace fastbn
