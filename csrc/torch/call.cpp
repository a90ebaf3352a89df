// Validation, canonical layouts and launches.
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

bool is_half(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

at::ScalarType param_dtype(const Tensor& input, const OptionalTensor& weight) {
  if (present(weight)) return weight->scalar_type();
  return is_half(input.scalar_type()) ? at::kFloat : input.scalar_type();
}

bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

void check_dense(const Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided, "fastbn: ", name, " must be a dense tensor, but its layout is ", t.layout());
}

size_t storage_bytes(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), size_t(t.storage_offset()));
}

void refuse_memory(const Tensor& t, const char* name) {
  TORCH_CHECK(false, "fastbn: the memory of ", name, " was freed, or is too small: its sizes ", t.sizes(),
              " and strides ", t.strides(), " need a storage of ", storage_bytes(t), " bytes, but it has ",
              t.storage().nbytes());
}

void check_input(const Tensor& input) {
  check_dense(input, "input");
  check_device(input);
  check_memory(input, "input");
}

void check_same_device(const Tensor& t, const char* name, const Tensor& input) {
  check_dense(t, name);
  TORCH_CHECK(t.device() == input.device(), "fastbn: ", name, " is on device ", t.device(), ", but input is on device ",
              input.device());
  check_memory(t, name);
}

bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params) {
  const auto type = input.scalar_type();
  std::optional<at::ScalarType> shared;
  for (const OptionalTensor* t : params) {
    if (!present(*t)) continue;
    const auto own = (*t)->scalar_type();
    if (!(own == type || (is_half(type) && own == at::kFloat)) || shared.value_or(own) != own) return false;
    shared = own;
  }
  return true;
}

namespace {

void check_channels(const OptionalTensor& t, const char* name, int64_t channels, const Tensor& input) {
  if (!present(t)) return;
  check_same_device(*t, name, input);
  TORCH_CHECK(t->numel() == channels, name, " should contain ", channels, " elements not ", t->numel());
}

void check_dtypes(const Tensor& input, std::initializer_list<const OptionalTensor*> params) {
  dtype_of(input);
  TORCH_CHECK(dtypes_agree(input, params), "mixed dtype: weight and bias should have the dtype of input, ",
              input.scalar_type(), ", or both be Float beside a half input");
}

void check_residual(const OptionalTensor& residual, const Tensor& input) {
  if (!present(residual)) return;
  check_same_device(*residual, "residual", input);
  TORCH_CHECK(residual->sizes() == input.sizes(), "residual should have the sizes of input, ", input.sizes(), ", not ",
              residual->sizes());
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "residual should have the dtype of input, ",
              input.scalar_type(), ", not ", residual->scalar_type());
}

}  // namespace

int64_t checked_channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const Tensor* grad_output) {
  check_input(input);
  if (grad_output != nullptr) check_same_device(*grad_output, "grad_output", input);
  TORCH_CHECK_INDEX(input.dim() >= 2, "fastbn: input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  const int64_t channels = input.size(1);
  if (grad_output != nullptr) {
    TORCH_CHECK(grad_output->sizes() == input.sizes(), "grad_output should have the sizes of input, ", input.sizes(),
                ", not ", grad_output->sizes());
    TORCH_CHECK(grad_output->scalar_type() == input.scalar_type(), "grad_output should have the dtype of input, ",
                input.scalar_type(), ", not ", grad_output->scalar_type());
  }
  check_channels(weight, "weight", channels, input);
  check_channels(bias, "bias", channels, input);
  check_dtypes(input, {&weight, &bias});
  check_residual(residual, input);
  return channels;
}

void check_moments(const Tensor& moments, at::IntArrayRef sizes) {
  TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments should be float64, not ", moments.scalar_type());
  TORCH_CHECK(moments.sizes() == sizes, "moments should have sizes ", sizes, ", not ", moments.sizes());
}

int64_t channels_of(const Tensor& input) {
  TORCH_CHECK_INDEX(input.dim() >= 2, "fastbn: input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  return input.size(1);
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

at::MemoryFormat gradient_format(const Canonical& x, const Tensor& input) {
  return x.format == at::MemoryFormat::Contiguous ? input.suggest_memory_format() : x.format;
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
    return cuda::forward(*on_gpu, args, args.training ? context.stream_with_counters() : context.stream());
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
    return cuda::backward(*on_gpu, args, context.stream_with_counters());
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

void check_counter(const Statistics& statistics) {
  if (!present(statistics.batches)) return;
  const Tensor& t = *statistics.batches;
  if (t.layout() == at::kStrided && has_kernels(t.device())) check_memory(t, "num_batches_tracked");
}

void check_running(const Statistics& statistics, int64_t channels, const Tensor& other, const char* other_name) {
  for (const auto& [t, name] : {std::pair(&statistics.mean, "running_mean"), {&statistics.var, "running_var"}}) {
    check_dense(**t, name);
    TORCH_CHECK((*t)->device() == other.device(), "fastbn: ", name, " is on device ", (*t)->device(), ", but ",
                other_name, " is on device ", other.device());
    TORCH_CHECK((*t)->numel() == channels, name, " should contain ", channels, " elements not ", (*t)->numel());
    check_memory(**t, name);
  }
}

at::MemoryFormat output_format(const Tensor& input) {
  for (const auto format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    if (input.is_contiguous(format)) return format;
  }
  return input.suggest_memory_format();
}

void check_device(const Tensor& input) {
  TORCH_CHECK(has_kernels(input.device()), "fastbn: input is on ", input.device(),
              ", and this build of fastbn has kernels for ",
#if defined(FASTBN_CUDA)
              "CPU and CUDA only. Move the model there, or use torch.nn's batch norm."
#else
              "the CPU only. Use torch.nn's batch norm there, or build fastbn with CUDA, where nvcc and a torch for"
              " CUDA are: FASTBN_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps fastbn"
#endif
  );
}

}  // namespace fastbn
