// In: tensors of any layout. Out: a Problem for the backend, and the tensors it filled.
#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <memory>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/pages.h"

namespace fastbn {

namespace {

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

bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided, "fastbn: ", name, " must be a dense tensor, but its layout is ", t.layout());
  TORCH_CHECK(t.is_cpu(), "fastbn: ", name, " is on ", t.device(),
              ", and this build of fastbn has kernels for the CPU only. Move the model to the CPU, or use torch.nn's"
              " batch norm there.");
}

void check_channels(const OptionalTensor& t, const char* name, int64_t channels) {
  if (!present(t)) return;
  check_device(*t, name);
  TORCH_CHECK(t->numel() == channels, name, " should contain ", channels, " elements not ", t->numel());
}

void check_dtypes(const Tensor& input, std::initializer_list<const OptionalTensor*> params) {
  dtype_of(input);
  TORCH_CHECK(dtypes_agree(input, params), "mixed dtype (CPU): weight and bias should have the dtype of input, ",
              input.scalar_type(), ", or both be Float beside a half input");
}

void check_moments(const Tensor& moments, int64_t channels) {
  check_device(moments, "moments");
  TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments should be float64, not ", moments.scalar_type());
  TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2 && moments.size(1) == channels,
              "moments should have sizes [2, ", channels, "], not ", moments.sizes());
}

int64_t channels_of(const Tensor& input) {
  TORCH_CHECK_INDEX(input.dim() >= 2, "fastbn: input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  return input.size(1);
}

// The memory format of torch's output: the input's own, or what torch suggests for one that has none.
at::MemoryFormat output_format(const Tensor& input) {
  for (const auto format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    if (input.is_contiguous(format)) return format;
  }
  return input.suggest_memory_format();
}

// The tensor in one of the two layouts that kernels know, copied if it is in neither.
struct Folded {
  Tensor tensor;
  at::MemoryFormat format;
  Problem problem;
};

Folded fold(const Tensor& input) {
  Folded f;
  f.format = output_format(input);
  f.tensor = input.contiguous(f.format);
  const int64_t channels = input.size(1);
  const int64_t samples = input.size(0);
  f.problem.dtype = dtype_of(input);
  f.problem.shape = {samples, channels, input.numel() / (samples * channels),
                     f.format == at::MemoryFormat::Contiguous ? Layout::channels_first : Layout::channels_last};
  return f;
}

// Where both formats mean the same order in memory (one channel, say), torch's gradient has the strides of
// the one that it suggests, and its output does not.
at::MemoryFormat gradient_format(const Folded& x, const Tensor& input) {
  return x.format == at::MemoryFormat::Contiguous ? input.suggest_memory_format() : x.format;
}

// Not at::empty: for tensors of this one device the dispatcher costs more than the allocation.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

// For outputs of large_bytes and more; see cpu/pages.h.
struct LargeAllocator final : c10::Allocator {
  struct Block {
    void* data;
    int64_t bytes;
  };
  static void free(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    cpu::give_pages(block->data, block->bytes);
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Block{cpu::take_pages(int64_t(bytes)), int64_t(bytes)});
    c10::profiledCPUMemoryReporter().New(block->data, bytes);
    void* const data = block->data;
    return {data, block.release(), &free, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Tensor fresh_like(const Tensor& t, at::MemoryFormat format) {
  if (int64_t(t.nbytes()) < cpu::large_bytes) return at::detail::empty_cpu(t.sizes(), t.scalar_type(), false, format);
  static LargeAllocator* const allocator = new LargeAllocator;  // outlives every tensor
  return at::detail::empty_generic(t.sizes(), allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), t.scalar_type(),
                                   format);
}

Param param(const OptionalTensor& t, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::f32};
  keep = t->contiguous();
  return {keep.data_ptr(), dtype_of(keep)};
}

// Memory for one call: on the stack while it is small, else from torch's allocator.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > int64_t(sizeof(small_))) large_ = fresh({bytes}, at::kByte);
  }
  void* data() { return large_.defined() ? large_.data_ptr() : small_; }

 private:
  alignas(64) char small_[4096];
  Tensor large_;
};

// The value at i of a tensor of C values, strided or not.
template <class F>
void each_channel(const Tensor& t, const F& f) {
  Tensor flat = t.dim() == 1 ? t : t.reshape({-1});
  const int64_t stride = flat.stride(0);
  dispatch_dtype(dtype_of(t), [&](auto type) {
    using T = typename decltype(type)::type;
    T* data = static_cast<T*>(flat.data_ptr());
    for (int64_t c = 0; c < flat.numel(); ++c) f(c, data[c * stride]);
  });
}

void blend(const Tensor& running, const double* batch, double momentum, double factor) {
  const auto update = [&](const Tensor& target) {
    each_channel(target, [&](int64_t c, auto& value) {
      using T = std::remove_reference_t<decltype(value)>;
      const double old = double(to_acc(value));
      value = from_acc<T>(acc_t<T>((1 - momentum) * old + momentum * (batch[c] * factor)));
    });
  };
  if (running.dim() == 1) {
    update(running);
  } else {
    const Tensor flat = running.reshape({-1}).clone();
    update(flat);
    running.copy_(flat.view(running.sizes()));
  }
}

}  // namespace

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

std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps) {
  check_device(input, "input");
  const int64_t channels = channels_of(input);
  const bool training = !present(moments);
  check_channels(weight, "weight", channels);
  check_channels(bias, "bias", channels);
  check_dtypes(input, {&weight, &bias});
  if (!training) check_moments(*moments, channels);

  Tensor kept = training ? fresh({2, channels}, at::kDouble) : moments->contiguous();
  if (input.numel() == 0) return {fresh_like(input, at::MemoryFormat::Contiguous), training ? kept.zero_() : kept};
  const Folded x = fold(input);
  Tensor output = fresh_like(input, x.format);

  Tensor kept_weight, kept_bias;
  Scratch scratch(cpu::workspace_bytes(x.problem));
  Forward args{x.problem,
               x.tensor.const_data_ptr(),
               output.data_ptr(),
               param(weight, kept_weight),
               param(bias, kept_bias),
               kept.data_ptr<double>(),
               training,
               eps,
               scratch.data()};
  cpu::forward(args);
  return {output, kept};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const OptionalTensor& weight, const Tensor& moments, double eps,
                                            bool training, std::array<bool, 3> mask) {
  check_device(input, "input");
  check_device(grad_output, "grad_output");
  const int64_t channels = channels_of(input);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "grad_output should have the sizes of input, ", input.sizes(),
              ", not ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output should have the dtype of input, ",
              input.scalar_type(), ", not ", grad_output.scalar_type());
  check_channels(weight, "weight", channels);
  check_dtypes(input, {&weight});
  check_moments(moments, channels);

  const auto param_dtype = present(weight)                ? weight->scalar_type()
                           : is_half(input.scalar_type()) ? at::kFloat
                                                          : input.scalar_type();
  std::tuple<Tensor, Tensor, Tensor> grads;
  if (input.numel() == 0) {
    if (mask[0]) std::get<0>(grads) = fresh_like(input, input.suggest_memory_format());
    if (mask[1]) std::get<1>(grads) = fresh({channels}, param_dtype).zero_();
    if (mask[2]) std::get<2>(grads) = fresh({channels}, param_dtype).zero_();
    return grads;
  }

  const Folded x = fold(input);
  const Tensor dy = grad_output.contiguous(x.format);
  const Tensor saved = moments.contiguous();
  Tensor dx, kept_weight;
  if (mask[0]) dx = fresh_like(input, gradient_format(x, input));
  const bool wants_sums = mask[1] || mask[2];
  const int64_t sums_bytes = round_up(2 * channels * int64_t(sizeof(double)), 64);
  Scratch scratch(sums_bytes + cpu::workspace_bytes(x.problem));
  double* const sums = static_cast<double*>(scratch.data());
  Backward args{x.problem,
                dy.const_data_ptr(),
                x.tensor.const_data_ptr(),
                mask[0] ? dx.data_ptr() : nullptr,
                param(weight, kept_weight),
                saved.const_data_ptr<double>(),
                wants_sums ? sums : nullptr,
                training,
                eps,
                static_cast<char*>(scratch.data()) + sums_bytes};
  if (mask[0] || wants_sums) cpu::backward(args);

  std::get<0>(grads) = dx;
  const auto to_param = [&](int64_t row) {
    Tensor grad = fresh({channels}, param_dtype);
    const double* from = sums + row * channels;
    each_channel(grad, [&](int64_t c, auto& value) {
      using T = std::remove_reference_t<decltype(value)>;
      value = from_acc<T>(acc_t<T>(from[c]));
    });
    return grad;
  };
  if (mask[1]) std::get<1>(grads) = to_param(0);
  if (mask[2]) std::get<2>(grads) = to_param(1);
  return grads;
}

Tensor running_moments(const Tensor& running_mean, const Tensor& running_var) {
  const int64_t channels = running_mean.numel();
  check_channels(running_mean, "running_mean", channels);
  check_channels(running_var, "running_var", channels);
  Tensor moments = fresh({2, channels}, at::kDouble);
  double* out = moments.data_ptr<double>();
  for (const Tensor& t : {running_mean, running_var}) {
    each_channel(t, [&](int64_t c, const auto& value) { out[c] = double(to_acc(value)); });
    out += channels;
  }
  return moments;
}

void update_running_stats(const Tensor& moments, int64_t count, std::optional<double> momentum,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked) {
  TORCH_CHECK_VALUE(present(running_mean) == present(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  if (!present(running_mean)) return;
  TORCH_CHECK(moments.dim() == 2, "moments should have sizes [2, C], not ", moments.sizes());
  const int64_t channels = moments.size(1);
  check_moments(moments, channels);
  check_channels(running_mean, "running_mean", channels);
  check_channels(running_var, "running_var", channels);
  TORCH_CHECK_VALUE(count >= 0, "count should be the number of values in a channel, not ", count);
  if (count == 0) return;
  double factor = 0;
  if (momentum) {
    factor = *momentum;
  } else if (present(num_batches_tracked)) {
    TORCH_CHECK(num_batches_tracked->numel() == 1, "num_batches_tracked should contain 1 element not ",
                num_batches_tracked->numel());
    factor = 1.0 / num_batches_tracked->item<double>();
  }
  const Tensor kept = moments.contiguous();
  const double* m = kept.const_data_ptr<double>();
  const double n = double(count);
  blend(*running_mean, m, factor, 1);
  blend(*running_var, m + channels, factor, n / (n - 1));
  for (const Tensor& t : {*running_mean, *running_var}) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fastbn
