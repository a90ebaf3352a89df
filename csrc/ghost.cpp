// In: a batch, and how many samples a chunk has. Out: ghost batch norm: each chunk normalized by itself.
#include <ATen/Parallel.h>

#include "call.h"
#include "cpu/parallel.h"

namespace fastbn {

namespace {

// The chunks of ghost batch norm, cut along the samples: each is contiguous in both layouts.
struct Chunks {
  Problem whole;
  int64_t samples, count;

  Problem problem(int64_t i) const {
    Problem p = whole;
    p.shape.N = i + 1 < count ? samples : whole.shape.N - i * samples;
    p.parts = count;
    return p;
  }
  int64_t bytes() const { return samples * whole.shape.C * whole.shape.S * size_of(whole.dtype); }
  // The last one may be larger than the others, by a sample.
  int64_t workspace(const Context& context, cuda::Pass pass) const {
    const int64_t most = larger(workspace_bytes(context, problem(0), pass, true),
                                workspace_bytes(context, problem(count - 1), pass, true));
    return round_up(most, 256);
  }

  // call(i, workspace) for every chunk: one after the other on a GPU; on the CPU each in a thread of its own, where
  // there are enough of them, because what a thread needs of a chunk of usual size stays in its cache.
  template <class Call>
  void each(const Context& context, cuda::Pass pass, const Call& call) const {
    const bool side_by_side = !context.on_gpu() && count >= at::get_num_threads();
    const int64_t apart = workspace(context, pass);
    const Tensor memory = context.empty({side_by_side ? count * apart : apart}, at::kByte);
    char* const data = static_cast<char*>(memory.data_ptr());
    if (side_by_side) {
      cpu::parallel_for(count, count * bytes(), [&](int64_t i) { call(i, data + i * apart); });
    } else {
      for (int64_t i = 0; i < count; ++i) call(i, data);
    }
  }
};

template <class T>
T* behind(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
}

}  // namespace

int64_t ghost_chunks(at::IntArrayRef sizes, int64_t samples) {
  TORCH_CHECK_VALUE(samples > 0, "virtual_batch_size should be positive, not ", samples);
  const int64_t batch = sizes[0], positions = c10::multiply_integers(sizes.slice(2));
  const int64_t count = ceil_div(batch, samples);
  const bool single = count > 1 && (batch - (count - 1) * samples) * positions == 1;
  return count - single;
}

std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t samples, double eps) {
  check_input(input);
  const int64_t channels = channels_of(input);
  check_channels(weight, "weight", channels, input);
  check_channels(bias, "bias", channels, input);
  check_dtypes(input, {&weight, &bias});
  const int64_t count = ghost_chunks(input.sizes(), samples);

  Context context(input);
  Tensor moments = context.empty({count, 2, channels}, at::kDouble);
  if (input.numel() == 0) return {context.empty_like(input, at::MemoryFormat::Contiguous), moments.zero_()};
  const Folded x = fold(input);
  Tensor output = context.empty_like(input, x.format);
  Tensor kept_weight, kept_bias;
  Forward whole{};
  whole.input = x.tensor.const_data_ptr();
  whole.output = output.data_ptr();
  whole.weight = param(weight, kept_weight);
  whole.bias = param(bias, kept_bias);
  whole.moments = moments.data_ptr<double>();
  whole.training = true;
  whole.eps = eps;
  const Chunks chunks{x.problem, samples, count};
  chunks.each(context, cuda::Pass::forward, [&](int64_t i, void* workspace) {
    Forward args = whole;
    args.problem = chunks.problem(i);
    args.input = behind(whole.input, i * chunks.bytes());
    args.output = behind(whole.output, i * chunks.bytes());
    args.moments = whole.moments + i * 2 * channels;
    args.workspace = workspace;
    launch(context, args);
  });
  return {output, moments};
}

std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t samples, double eps, std::array<bool, 3> wanted) {
  check_input(input);
  check_beside(grad_output, "grad_output", input);
  check_beside(moments, "moments", input);
  const int64_t channels = channels_of(input), count = ghost_chunks(input.sizes(), samples);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "grad_output should have the sizes of input, ", input.sizes(),
              ", not ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output should have the dtype of input, ",
              input.scalar_type(), ", not ", grad_output.scalar_type());
  check_channels(weight, "weight", channels, input);
  check_dtypes(input, {&weight});
  TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments should be float64, not ", moments.scalar_type());
  TORCH_CHECK(moments.sizes() == at::IntArrayRef({count, 2, channels}), "moments should have sizes [", count, ", 2, ",
              channels, "], not ", moments.sizes());

  Context context(input);
  Tensor dx, dw, db;  // of weight and bias for each chunk, so that one rounding ends the sum over chunks
  if (wanted[1]) dw = context.empty({count, channels}, at::kDouble);
  if (wanted[2]) db = context.empty({count, channels}, at::kDouble);
  if (input.numel() == 0) {
    if (wanted[0]) dx = context.empty_like(input, input.suggest_memory_format());
  } else if (wanted[0] || wanted[1] || wanted[2]) {
    const Folded x = fold(input);
    const Tensor dy = grad_output.contiguous(x.format), given = moments.contiguous();
    if (wanted[0]) dx = context.empty_like(input, gradient_format(x, input));
    Tensor kept_weight;
    Backward whole{};
    whole.grad_output = dy.const_data_ptr();
    whole.input = x.tensor.const_data_ptr();
    whole.grad_input = dx.defined() ? dx.data_ptr() : nullptr;
    whole.weight = param(weight, kept_weight);
    whole.moments = given.const_data_ptr<double>();
    whole.grad_weight = {dw.defined() ? dw.data_ptr() : nullptr, DType::f64};
    whole.grad_bias = {db.defined() ? db.data_ptr() : nullptr, DType::f64};
    whole.training = true;
    whole.eps = eps;
    const Chunks chunks{x.problem, samples, count};
    chunks.each(context, cuda::Pass::backward, [&](int64_t i, void* workspace) {
      const int64_t row = i * channels * int64_t(sizeof(double));
      Backward args = whole;
      args.problem = chunks.problem(i);
      args.grad_output = behind(whole.grad_output, i * chunks.bytes());
      args.input = behind(whole.input, i * chunks.bytes());
      args.grad_input = behind(whole.grad_input, i * chunks.bytes());
      args.moments = whole.moments + i * 2 * channels;
      args.grad_weight.data = behind(whole.grad_weight.data, row);
      args.grad_bias.data = behind(whole.grad_bias.data, row);
      args.workspace = workspace;
      launch(context, args);
    });
  }
  const auto param_dtype = present(weight)                ? weight->scalar_type()
                           : is_half(input.scalar_type()) ? at::kFloat
                                                          : input.scalar_type();
  if (dw.defined()) dw = dw.sum(0).to(param_dtype);
  if (db.defined()) db = db.sum(0).to(param_dtype);
  return {dx, dw, db};
}

}  // namespace fastbn
