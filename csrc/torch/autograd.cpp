// Eager batch norm: the forward pass and the autograd node of its backward pass. In C++ because a small batch norm is
// all overhead: torch.autograd.Function alone costs as much as torch's whole batch norm.
#include "autograd.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "arguments.h"

// torch 2.6 has another interface.
#define FASTBN_COMPILED_AUTOGRAD (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7)
#if FASTBN_COMPILED_AUTOGRAD
#include <torch/csrc/dynamo/compiled_autograd.h>
#endif

namespace fastbn {

namespace {

// N gradients by a function of Python, for a backward pass that is itself differentiated, mapped or traced.
template <size_t N, class... Args>
std::array<Tensor, N> gradients_of_python(const char* module, const char* function, const Args&... args) {
  namespace py = pybind11;
  py::gil_scoped_acquire gil;
  const py::object made = py::module_::import(module).attr(function)(args...);
  const auto found = made.template cast<std::array<OptionalTensor, N>>();
  std::array<Tensor, N> gradients;
  for (size_t i = 0; i < N; ++i) gradients[i] = found[i].value_or(Tensor());
  return gradients;
}

Gradients differentiable_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& w, const OptionalTensor& b,
                                  const Tensor& moments, double eps, bool training, std::array<bool, 4> wanted,
                                  const EpilogueArgs& epilogue) {
  return gradients_of_python<4>("fastbn.autograd", "differentiable_backward", dy, x, w, moments, eps, training, wanted,
                                name_of(epilogue), param_of(epilogue), b, epilogue.residual);
}

constexpr c10::DispatchKeySet fast_path_keys{
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

// Whether kernels can read the memory of the tensor, and no other dispatch key applies.
bool is_dense(const Tensor& t) { return fast_path_keys.isSupersetOf(t.key_set()) && t.layout() == at::kStrided; }

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

OptionalTensor unpack(const torch::autograd::SavedVariable& variable) { return optional(variable.unpack()); }

// Whether the backward pass has to consist of operators: it is differentiated again, mapped or traced.
bool in_operators(const Tensor& dy, const Tensor& x) {
  return at::GradMode::is_enabled() || is_watched() || !is_fast_path_tensor(dy) || !is_fast_path_tensor(x);
}

// torch holds nodes by shared_ptr, and newer versions by intrusive_ptr.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  }
}

#if FASTBN_COMPILED_AUTOGRAD
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// Adds a call of `function(gradients, tensors)` to the graph of torch._dynamo.compiled_autograd in place of `node`.
// Everything that the function captures must be in the compiled_args of the node. If it is not traceable it runs in
// eager mode between two graphs.
variable_list capture(torch::autograd::Node& node, const SwapSavedVariables& swapped, const variable_list& inputs,
                      const variable_list& tensors, bool traceable,
                      std::function<variable_list(const variable_list&, const variable_list&)> function) {
  namespace dynamo = torch::dynamo::autograd;
  const auto& python = dynamo::getPyCompilerInterface();
  const std::vector<c10::IValue> args(tensors.begin(), tensors.end());
  const std::string name = python->bind_function(
      swapped.get_py_compiler(), node.name(),
      [function](const variable_list& grads, const std::vector<c10::IValue>& values) {
        variable_list given;
        for (const c10::IValue& value : values) given.push_back(value.toTensor());
        return function(grads, given);
      },
      std::vector<at::TypePtr>(args.size(), at::TensorType::get()), /*is_custom_function=*/true, traceable);
  using Metadata = dynamo::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>;
  return python->call_function(swapped.get_py_compiler(), "apply_functional", name, inputs, args,
                               Metadata::pack(dynamo::get_input_metadata(node.next_edges())));
}
#endif

struct BatchNormBackward : torch::autograd::Node {
  torch::autograd::SavedVariable input, weight, bias, residual;  // the last two only if z is recomputed
  Saved saved;
  EpilogueArgs epilogue;  // its residual is in `residual`
  double eps = 0;
  bool training = false;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const Tensor dy = std::move(grads[0]);
    if (!dy.defined()) return torch::autograd::variable_list(4);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x = input.unpack();
    const OptionalTensor w = unpack(weight), b = unpack(bias);
    return gradients(dy, x, w, b, wanted(), {epilogue.activation, epilogue.param, unpack(residual)});
  }

  std::array<bool, 4> wanted() {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
            task_should_compute_output(3)};
  }

  torch::autograd::variable_list gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                           const OptionalTensor& b, std::array<bool, 4> wanted,
                                           const EpilogueArgs& epilogue) {
    if (in_operators(dy, x)) return differentiable(dy, x, w, b, wanted, epilogue);
    auto [dx, dw, db, dr] = backward(dy, x, w, b, saved, eps, training, wanted, epilogue, is_ours_alone(dy));
    return {dx, dw, db, dr};
  }

  // Whether nobody else holds the tensor or its memory, so that it can be overwritten.
  static bool is_ours_alone(const Tensor& t) {
    const auto& storage = t.storage();
    return t.use_count() == 1 && storage.use_count() == 1 && storage.unsafeGetStorageImpl()->resizable() &&
           !t.requires_grad();
  }

  torch::autograd::variable_list differentiable(const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                                const OptionalTensor& b, std::array<bool, 4> wanted,
                                                const EpilogueArgs& epilogue) {
    if (!saved.mask.defined()) {
      auto [dx, dw, db, dr] = differentiable_backward(dy, x, w, b, saved.moments, eps, training, wanted, epilogue);
      return {dx, dw, db, dr};
    }
    check_memory_of_any(dy, "grad_output");
    // dz = dy * factor, where the factor, which the mask defines, is constant.
    Tensor factor;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      factor = backward(at::ones_like(x), x, w, b, saved, eps, false, {false, false, false, true}, epilogue)[3];
    }
    const Tensor dz = dy.masked_fill(factor.eq(0), 0).mul(factor);  // an infinite dy times zero would be NaN
    auto [dx, dw, db, _] = differentiable_backward(dz, x, w, b, saved.moments, eps, training,
                                                   {wanted[0], wanted[1], wanted[2], false}, {});
    return {dx, dw, db, wanted[3] ? dz : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* variable : {&input, &weight, &bias, &residual}) variable->reset_data();
    saved.mask = Tensor();
  }

#if FASTBN_COMPILED_AUTOGRAD
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const auto* variable : {&input, &weight, &bias, &residual}) args.collect(*variable, /*is_output=*/false);
    args.collect(saved.moments);
    args.collect(saved.mask);
    args.collect(int64_t(epilogue.activation));
    args.collect(epilogue.param);
    args.collect(eps);
    args.collect(training);
  }

  variable_list apply_with_saved(const variable_list& inputs, SwapSavedVariables& swapped) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* variable : {&input, &weight, &bias, &residual}) swapped.before(*variable);
    for (Tensor* t : {&saved.moments, &saved.mask}) swapped.before(*t);
    const variable_list tensors = {input.unpack(),    weight.unpack(), bias.unpack(),
                                   residual.unpack(), saved.moments,   saved.mask};
    const auto call = [wanted = wanted(), activation = epilogue.activation, param = epilogue.param, eps = eps,
                       training = training](const variable_list& grads, const variable_list& t) {
      if (!grads[0].defined()) return variable_list(4);
      const auto node = make_node<BatchNormBackward>();
      node->saved = {t[4], t[5]};
      node->eps = eps;
      node->training = training;
      return node->gradients(grads[0], t[0], optional(t[1]), optional(t[2]), wanted,
                             {activation, param, optional(t[3])});
    };
    const bool traceable = !saved.mask.defined();  // only kernels read a mask
    variable_list results = capture(*this, swapped, inputs, tensors, traceable, call);
    for (auto* variable : {&input, &weight, &bias, &residual}) swapped.after(*variable);
    for (Tensor* t : {&saved.moments, &saved.mask}) swapped.after(*t);
    return results;
  }
#endif

  std::string name() const override { return "FastBatchNormBackward"; }
};

struct GhostBatchNormBackward : torch::autograd::Node {
  torch::autograd::SavedVariable input, weight;
  Tensor moments;
  int64_t chunk_size = 0;
  double eps = 0;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const Tensor dy = std::move(grads[0]);
    if (!dy.defined()) return torch::autograd::variable_list(3);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x = input.unpack();
    const OptionalTensor w = unpack(weight);
    return gradients(dy, x, w, moments, chunk_size, eps, wanted());
  }

  std::array<bool, 3> wanted() {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
  }

  static torch::autograd::variable_list gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                                  const Tensor& moments, int64_t chunk_size, double eps,
                                                  std::array<bool, 3> wanted) {
    auto [dx, dw, db] = in_operators(dy, x)
                            ? gradients_of_python<3>("fastbn.functional.ghost", "differentiable_backward_of_chunks", dy,
                                                     x, w, moments, chunk_size, eps, wanted)
                            : ghost_backward(dy, x, w, moments, chunk_size, eps, wanted);
    return {dx, dw, db};
  }

#if FASTBN_COMPILED_AUTOGRAD
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const auto* variable : {&input, &weight}) args.collect(*variable, /*is_output=*/false);
    args.collect(moments);
    args.collect(chunk_size);
    args.collect(eps);
  }

  variable_list apply_with_saved(const variable_list& inputs, SwapSavedVariables& swapped) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* variable : {&input, &weight}) swapped.before(*variable);
    swapped.before(moments);
    const auto call = [wanted = wanted(), chunk_size = chunk_size, eps = eps](const variable_list& grads,
                                                                              const variable_list& t) {
      if (!grads[0].defined()) return variable_list(3);
      return gradients(grads[0], t[0], optional(t[1]), t[2], chunk_size, eps, wanted);
    };
    variable_list results =
        capture(*this, swapped, inputs, {input.unpack(), weight.unpack(), moments}, /*traceable=*/true, call);
    for (auto* variable : {&input, &weight}) swapped.after(*variable);
    swapped.after(moments);
    return results;
  }
#endif

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input.reset_data();
    weight.reset_data();
  }

  std::string name() const override { return "FastGhostBatchNormBackward"; }
};

}  // namespace

bool is_fast_path_tensor(const Tensor& t) { return is_dense(t) && !t._fw_grad(0).defined(); }

void check_memory_of_any(const Tensor& t, const char* name) {
  if (is_dense(t)) check_memory(t, name);
}

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool fast_path_eligible(const BatchNormArgs& args) {
  const auto& [input, weight, bias, running_mean, running_var, batches, training, momentum, eps, epilogue] = args;
  check_memory(input, "input");
  for (const auto& [t, name] : {std::pair(&weight, "weight"),
                                {&bias, "bias"},
                                {&running_mean, "running_mean"},
                                {&running_var, "running_var"},
                                {&batches, "num_batches_tracked"},
                                {&epilogue.residual, "residual"}}) {
    if (*t) check_memory(**t, name);
  }
  if (input.numel() == 0) return false;
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var}) {
    if (*t && (*t)->dim() != 1) return false;
  }
  if (batches && !(batches->scalar_type() == at::kLong && batches->numel() == 1)) return false;
  try {
    validate_plain(args);
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

Tensor batch_norm(const BatchNormArgs& args) {
  const Tensor& input = args.input;
  const Tensor w = args.weight.value_or(Tensor()), b = args.bias.value_or(Tensor());
  const Tensor r = args.epilogue.residual.value_or(Tensor());
  const bool wants_grad = torch::autograd::compute_requires_grad(input, w, b, r);

  Tensor output;
  Saved saved;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(output, saved) = forward(args, wants_grad);
  }
  if (wants_grad) {
    const bool needs_z = args.epilogue.activation != Activation::identity && !saved.mask.defined();
    const auto node = make_node<BatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, w, b, r));
    node->input = torch::autograd::SavedVariable(input, false);
    node->weight = torch::autograd::SavedVariable(w, false);
    if (needs_z) {
      node->bias = torch::autograd::SavedVariable(b, false);
      node->residual = torch::autograd::SavedVariable(r, false);
    }
    node->saved = std::move(saved);
    node->epilogue = {args.epilogue.activation, args.epilogue.param, std::nullopt};
    node->eps = args.eps;
    node->training = args.training;
    torch::autograd::set_history(output, node);
  }
  return output;
}

Tensor ghost_batch_norm(const BatchNormArgs& args, int64_t chunk_size) {
  const Tensor& input = args.input;
  const Tensor w = args.weight.value_or(Tensor()), b = args.bias.value_or(Tensor());
  const bool wants_grad = torch::autograd::compute_requires_grad(input, w, b);
  Tensor output, moments;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(output, moments) = ghost_forward(input, args.weight, args.bias, chunk_size, args.eps);
    ghost_update(moments, input.size(0), positions_of(input).expect_int(), chunk_size, args.statistics());
  }
  if (wants_grad) {
    const auto node = make_node<GhostBatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, w, b));
    node->input = torch::autograd::SavedVariable(input, false);
    node->weight = torch::autograd::SavedVariable(w, false);
    node->moments = std::move(moments);
    node->chunk_size = chunk_size;
    node->eps = args.eps;
    torch::autograd::set_history(output, node);
  }
  return output;
}

}  // namespace fastbn
