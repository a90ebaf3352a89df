// In: calls of batch_norm in eager mode. Out: the output, running statistics and counter updated, and a node
// that keeps what backward needs. In C++ because a small batch norm is all overhead: torch.autograd.Function
// alone costs as much as torch's whole batch norm.
#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace fastbn {

namespace {

DifferentiableBackward& differentiable_backward() {
  static DifferentiableBackward f;
  return f;
}

struct BatchNormBackward : torch::autograd::Node {
  torch::autograd::SavedVariable input, weight;
  Tensor moments;
  double eps = 0;
  bool training = false;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const Tensor dy = std::move(grads[0]);
    if (!dy.defined()) return torch::autograd::variable_list(3);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x = input.unpack();
    const Tensor unpacked_weight = weight.unpack();
    const OptionalTensor w = unpacked_weight.defined() ? OptionalTensor(unpacked_weight) : std::nullopt;
    const std::array<bool, 3> mask = {task_should_compute_output(0), task_should_compute_output(1),
                                      task_should_compute_output(2)};
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy) || !is_plain(x)) {
      auto [dx, dw, db] = differentiable_backward()(dy, x, w, moments, eps, training, mask);
      return {dx, dw, db};
    }
    auto [dx, dw, db] = backward(dy, x, w, moments, eps, training, mask);
    return {dx, dw, db};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input.reset_data();
    weight.reset_data();
  }

  std::string name() const override { return "FastBatchNormBackward"; }
};

// torch counts references to nodes with shared_ptr up to some version, and inside the node after it.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  }
}

}  // namespace

void set_differentiable_backward(DifferentiableBackward f) { differentiable_backward() = std::move(f); }

bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet ordinary{
      c10::DispatchKey::CPU,
      c10::DispatchKey::AutogradCPU,
      c10::DispatchKey::AutocastCPU,
#if defined(FASTBN_CUDA)
      c10::DispatchKey::CUDA,
      c10::DispatchKey::AutogradCUDA,
      c10::DispatchKey::AutocastCUDA,
#endif
      c10::DispatchKey::ADInplaceOrView,
  };
  return ordinary.isSupersetOf(t.key_set()) && t.layout() == at::kStrided && !t._fw_grad(0).defined();
}

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_ordinary(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 const OptionalTensor& num_batches_tracked, bool training, double eps) {
  if (input.dim() < 2 || input.numel() == 0) return false;
  const int64_t channels = input.size(1);
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var}) {
    if (*t && ((*t)->dim() != 1 || (*t)->size(0) != channels || (*t)->device() != input.device())) return false;
  }
  for (const OptionalTensor* t : {&running_mean, &running_var}) {
    if (*t ? (*t)->requires_grad() : !training) return false;
  }
  if (running_mean.has_value() != running_var.has_value()) return false;
  if (num_batches_tracked && !(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1)) {
    return false;
  }
  return (training ? eps > 0 && input.numel() > channels : eps >= 0) &&
         dtypes_agree(input, {&weight, &bias, &running_mean, &running_var});
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                  double eps) {
  const Tensor w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
  const bool wants_grad = torch::autograd::compute_requires_grad(input, w, b);

  Tensor output, moments;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Statistics statistics{running_mean, running_var, num_batches_tracked, momentum};
    std::tie(output, moments) = forward(input, weight, bias, statistics, training, eps, wants_grad);
  }
  if (wants_grad) {
    const auto node = make_node<BatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, w, b));
    node->input = torch::autograd::SavedVariable(input, false);
    node->weight = torch::autograd::SavedVariable(w, false);
    node->moments = std::move(moments);
    node->eps = eps;
    node->training = training;
    torch::autograd::set_history(output, node);
  }
  return output;
}

}  // namespace fastbn
