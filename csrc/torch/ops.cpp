// Batch norm and its gradients on tensors, by the backend of their device.
#include "ops.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "call.h"

namespace fastbn {

namespace {

// The common part of all forward passes, with valid arguments. Fills mask if the activation has one that backward can
// use instead of the residual.
Tensor run_forward(Context& context, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const EpilogueArgs& epilogue, Forward& args, Tensor* mask) {
  const Canonical x = canonicalize(input);
  Tensor output = context.empty_like(input, x.format);
  Tensor kept_weight, kept_bias, kept_residual;
  args.problem = x.problem;
  args.input = x.tensor.const_data_ptr();
  args.output = output.data_ptr();
  args.weight = param(weight, kept_weight);
  args.bias = param(bias, kept_bias);
  args.epilogue = {epilogue.activation, epilogue.param, data_of(epilogue.residual, x, kept_residual)};
  const PassPlan plan = fastbn::plan(context, args);
  Scratch scratch(context, plan.workspace_bytes);
  args.workspace = scratch.data();
  // Without a residual z is recomputed from x, which the backward pass reads anyway.
  if (mask != nullptr && plan.mask_bytes > 0 && has_mask(epilogue.activation) && args.epilogue.residual != nullptr &&
      on_vector(args.input) && on_vector(args.epilogue.residual)) {
    *mask = context.empty({plan.mask_bytes}, at::kByte);
    args.mask = mask->data_ptr();
  }
  launch(context, plan, args);
  return output;
}

struct NamedActivation {
  std::string_view name;
  Activation activation;
  double param;  // default; NaN: none
};
constexpr double none = std::numeric_limits<double>::quiet_NaN();
constexpr NamedActivation named_activations[] = {
    {"identity", Activation::identity, none},
    {"relu", Activation::relu, none},
    {"leaky_relu", Activation::leaky_relu, 0.01},
    {"relu6", Activation::relu6, none},
    {"elu", Activation::elu, 1},
    {"silu", Activation::silu, none},
    {"hardswish", Activation::hardswish, none},
    {"gelu", Activation::gelu, none},
    {"sigmoid", Activation::sigmoid, none},
    {"tanh", Activation::tanh, none},
};

}  // namespace

std::optional<EpilogueArgs> find_epilogue(std::string_view activation, std::optional<double> param,
                                          const OptionalTensor& residual) {
  for (const auto& a : named_activations) {
    if (a.name != activation) continue;
    const bool has_param = a.param == a.param;
    if (param && !has_param) return std::nullopt;
    return EpilogueArgs{a.activation, param.value_or(has_param ? a.param : 0), residual};
  }
  return std::nullopt;
}

EpilogueArgs parse_epilogue(std::string_view activation, std::optional<double> param, const OptionalTensor& residual) {
  if (const auto epilogue = find_epilogue(activation, param, residual)) return *epilogue;
  TORCH_CHECK_VALUE(!find_epilogue(activation, std::nullopt, residual), "activation_param should be None for ",
                    activation, ", which has none, not ", param.value_or(0));
  std::string names;
  for (const auto& [name, _] : activations()) names += (names.empty() ? "" : ", ") + std::string(name);
  TORCH_CHECK_VALUE(false, "activation should be one of ", names, ", not '", activation, "'");
}

std::string_view name_of(const EpilogueArgs& epilogue) { return activations()[size_t(epilogue.activation)].first; }

std::optional<double> param_of(const EpilogueArgs& epilogue) {
  const double standard = activations()[size_t(epilogue.activation)].second;
  return standard == standard ? std::optional(epilogue.param) : std::nullopt;
}

std::vector<std::pair<std::string_view, double>> activations() {
  std::vector<std::pair<std::string_view, double>> all;
  for (const auto& a : named_activations) all.emplace_back(a.name, a.param);
  return all;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps, const EpilogueArgs& epilogue) {
  const ProfilerEvent event("fastbn::batch_norm",
                            [&] { return std::vector<c10::IValue>{input, weight, bias, moments, epilogue.residual}; });
  const int64_t channels = readable_channels(input, weight, bias, epilogue.residual);
  const bool training = !present(moments);
  const bool with_counts = !training && moments->dim() == 2 && moments->size(0) == 3;  // BatchStats, with counts
  if (!training) check_readable_given(*moments, "moments", {with_counts ? 3 : 2, channels}, input);
  const Tensor given = training ? Tensor() : with_counts ? moments->narrow(0, 0, 2).clone() : *moments;

  Context context(input);
  Tensor kept = training ? context.empty({2, channels}, at::kDouble) : given.contiguous();
  if (input.numel() == 0) {
    return {context.empty_like(input, at::MemoryFormat::Contiguous), training ? kept.zero_() : kept};
  }
  Forward args{};
  args.training = training;
  args.eps = eps;
  if (training) {
    args.moments = kept.data_ptr<double>();
  } else {
    const double* const mean = kept.const_data_ptr<double>();
    args.mean = {mean, DType::f64};
    args.var = {mean + channels, DType::f64};
    args.precomputed_stats = with_counts;
  }
  Tensor output = run_forward(context, input, weight, bias, epilogue, args, nullptr);
  return {output, kept};
}

std::tuple<Tensor, Saved> forward(const BatchNormArgs& call, bool wants_backward) {
  const ProfilerEvent event(
      "fastbn::batch_norm",
      [&] {
        return std::vector<c10::IValue>{call.input,        call.weight,      call.bias,
                                        call.running_mean, call.running_var, call.epilogue.residual};
      },
      wants_backward);
  const Statistics statistics = call.statistics();
  const bool training = call.training;
  Context context(call.input);
  // The kernel increments the counter, which saves a launch, unless the momentum depends on it.
  const bool kernel_counts = training && context.on_gpu() && statistics.batches && statistics.mean &&
                             statistics.momentum && statistics.batches->device() == call.input.device();
  if (statistics.batches && !kernel_counts) count_batches(*statistics.batches, 1);
  Saved saved;
  if (training || wants_backward) saved.moments = context.empty({2, call.input.size(1)}, at::kDouble);
  Tensor* const mask = wants_backward ? &saved.mask : nullptr;
  Forward args{};
  args.training = training;
  args.eps = call.eps;
  args.moments = saved.moments.defined() ? saved.moments.data_ptr<double>() : nullptr;
  if (!training) {
    Tensor kept_mean, kept_var;
    args.mean = param(statistics.mean, kept_mean);
    args.var = param(statistics.var, kept_var);
    Tensor output = run_forward(context, call.input, call.weight, call.bias, call.epilogue, args, mask);
    return {output, saved};
  }
  RunningArgument running(statistics, context);
  args.running = running.get();
  if (kernel_counts) args.running.counter = statistics.batches->data_ptr<int64_t>();
  Tensor output = run_forward(context, call.input, call.weight, call.bias, call.epilogue, args, mask);
  running.store();
  if (kernel_counts) bump_version(*statistics.batches);
  return {output, saved};
}

Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                   std::array<bool, 4> wanted, const EpilogueArgs& epilogue, bool may_overwrite) {
  const int64_t channels = readable_channels(input, weight, bias, epilogue.residual, &grad_output);
  check_readable_given(saved.moments, "moments", {2, channels}, input);
  return run_backward(grad_output, input, weight, bias, saved, eps, training, wanted, epilogue, may_overwrite, {},
                      param_dtype(input, weight));
}

Gradients run_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                       std::array<bool, 4> wanted, const EpilogueArgs& epilogue, bool may_overwrite,
                       const GlobalSums& global, at::ScalarType dtype) {
  const ProfilerEvent event("fastbn::batch_norm_backward", [&] {
    return std::vector<c10::IValue>{grad_output, input, weight, bias, epilogue.residual};
  });
  Context context(input);
  Gradients grads;
  auto& [dx, dw, db, dz] = grads;
  if (wanted[1]) dw = context.empty({input.size(1)}, dtype);
  if (wanted[2]) db = context.empty({input.size(1)}, dtype);
  if (input.numel() == 0) {
    if (wanted[0]) dx = context.empty_like(input, input.suggest_memory_format());
    if (wanted[1]) dw.zero_();
    if (wanted[2]) db.zero_();
    if (wanted[3]) dz = grad_output;
    return grads;
  }
  const bool plain = epilogue.activation == Activation::identity;
  if (wanted[3] && plain) dz = grad_output;
  if (!wanted[0] && !wanted[1] && !wanted[2] && (plain || !wanted[3])) return grads;

  const Canonical x = canonicalize(input);
  Tensor dy = contiguous_in(grad_output, x.format);
  if (saved.mask.defined() && !on_vector(dy.const_data_ptr())) dy = dy.clone();
  const Tensor moments = saved.moments.contiguous();
  Tensor kept_weight, kept_bias, kept_residual;
  // Kernels compute the gradient of the residual on the way to that of the input.
  const bool makes_dz = wanted[3] && !plain, makes_dx = wanted[0] || makes_dz;
  if (makes_dx) dx = context.empty_like(input, gradient_format(x.format, input));
  // dz may overwrite dy unless it is scaled: packs may overlap and a pass may read dy twice, but masking twice is the
  // same as once.
  const bool in_place = saved.mask.defined() && epilogue.param == 0 && (may_overwrite || !dy.is_same(grad_output));
  if (makes_dz) dz = in_place ? dy : context.empty_like(input, x.format);
  const auto output = [](const Tensor& t) {
    return t.defined() ? Output{t.data_ptr(), dtype_of(t)} : Output{nullptr, DType::f32};
  };
  Backward args{};
  args.problem = x.problem;
  args.grad_residual = makes_dz ? dz.data_ptr() : nullptr;  // before const_data_ptr of dy, which may be the same tensor
  args.grad_output = dy.const_data_ptr();
  args.input = x.tensor.const_data_ptr();
  args.grad_input = output(dx).data;
  args.weight = param(weight, kept_weight);
  args.bias = param(bias, kept_bias);
  args.epilogue = {epilogue.activation, epilogue.param, plain ? nullptr : data_of(epilogue.residual, x, kept_residual)};
  args.mask = saved.mask.defined() ? saved.mask.const_data_ptr() : nullptr;
  args.moments = moments.const_data_ptr<double>();
  args.global_sums = global.sums, args.global_counts = global.counts;
  args.grad_weight = output(dw);
  args.grad_bias = output(db);
  args.training = training;
  args.eps = eps;
  const PassPlan plan = fastbn::plan(context, args);
  if (saved.mask.defined()) {
    const int64_t bytes = plan.mask_bytes;
    TORCH_CHECK(
        saved.mask.is_contiguous() && saved.mask.nbytes() == size_t(bytes) && saved.mask.device() == input.device(),
        "mask should have ", bytes, " bytes on ", input.device());
  }
  Scratch scratch(context, plan.workspace_bytes);
  args.workspace = scratch.data();
  launch(context, plan, args);
  if (!wanted[0]) dx = Tensor();
  return grads;
}

void update_running_stats(const Tensor& moments, int64_t count, const Statistics& statistics) {
  check_readable(moments, "moments");
  TORCH_CHECK(moments.dim() == 2, "moments should have sizes [2, C], not ", moments.sizes());
  check_float64(moments, "moments", {2, moments.size(1)});
  const int64_t channels = checked_statistics(statistics, moments, "moments");
  if (!present(statistics.mean)) return;
  TORCH_CHECK_VALUE(count >= 0, "count should be the number of values in a channel, not ", count);
  if (count == 0 || channels == 0) return;

  const Context context(moments);
  const Tensor kept = moments.contiguous();
  const double* const m = kept.const_data_ptr<double>();
  RunningArgument running(statistics, context);
#if defined(FASTBN_GPU)
  if (context.on_gpu()) {
    cuda::update_running_stats(m, channels, double(count), running.get(), context.stream());
    return running.store();
  }
#endif
  for (int64_t c = 0; c < channels; ++c) update(running.get(), c, m[c], m[channels + c], double(count));
  running.store();
}

}  // namespace fastbn
