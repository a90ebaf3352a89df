// The operators fastbn::* of torch's dispatcher, which compiled and exported programs contain: schemas and
// implementations.
#include "operators.h"

#include <torch/library.h>

namespace fastbn {

namespace {

// An operator has to return a tensor where the function returns none, and never an argument.
Tensor own(const Tensor& gradient, const Tensor& input, const Tensor& argument = Tensor()) {
  if (!gradient.defined()) return input.new_empty({0});
  return gradient.is_same(argument) ? gradient.clone(output_format(input)) : gradient;
}

}  // namespace

Tensor gather_stats_op(const Tensor& all_stats, std::optional<double> momentum, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
  return gather_stats(all_stats, {running_mean, running_var, num_batches_tracked, momentum});
}

Tensor backward_reduce_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                          const Tensor& batch_stats, double eps, std::string activation, std::optional<double> param,
                          const OptionalTensor& bias, const OptionalTensor& residual) {
  return backward_reduce(grad_output, input, weight, bias, batch_stats, eps,
                         parse_epilogue(activation, param, residual));
}

std::tuple<Tensor, Tensor> backward_elemt_op(const Tensor& grad_output, const Tensor& input,
                                             const OptionalTensor& weight, const Tensor& batch_stats,
                                             const Tensor& total, double eps, bool wants_residual,
                                             std::string activation, std::optional<double> param,
                                             const OptionalTensor& bias, const OptionalTensor& residual) {
  auto [dx, dr] = backward_elemt(grad_output, input, weight, bias, batch_stats, total, eps, wants_residual,
                                 parse_epilogue(activation, param, residual));
  return {dx, own(dr, input, grad_output)};
}

namespace {

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& moments, double eps, std::string activation,
                                      std::optional<double> param, const OptionalTensor& residual) {
  auto [output, kept] = forward(input, weight, bias, moments, eps, parse_epilogue(activation, param, residual));
  // Never an argument.
  return {output, moments && kept.is_same(*moments) ? kept.clone() : kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(const Tensor& grad_output, const Tensor& input,
                                                       const OptionalTensor& weight, const Tensor& moments, double eps,
                                                       bool training, std::array<bool, 4> output_mask,
                                                       std::string activation, std::optional<double> param,
                                                       const OptionalTensor& bias, const OptionalTensor& residual) {
  auto [dx, dw, db, dr] = backward(grad_output, input, weight, bias, {moments, Tensor()}, eps, training, output_mask,
                                   parse_epilogue(activation, param, residual));
  return {own(dx, input), own(dw, input), own(db, input), own(dr, input, grad_output)};
}

void update_running_stats_op(const Tensor& moments, int64_t count, std::optional<double> momentum,
                             const Tensor& running_mean, const Tensor& running_var,
                             const OptionalTensor& num_batches_tracked) {
  update_running_stats(moments, count, {running_mean, running_var, num_batches_tracked, momentum});
}

std::tuple<Tensor, Tensor, Tensor> ghost_backward_op(const Tensor& grad_output, const Tensor& input,
                                                     const OptionalTensor& weight, const Tensor& moments,
                                                     int64_t virtual_batch_size, double eps,
                                                     std::array<bool, 3> output_mask) {
  auto [dx, dw, db] = ghost_backward(grad_output, input, weight, moments, virtual_batch_size, eps, output_mask);
  return {own(dx, input), own(dw, input), own(db, input)};
}

void ghost_update_op(const Tensor& moments, int64_t values, int64_t last, std::optional<double> momentum,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked) {
  ghost_update(moments, values, last, {running_mean, running_var, num_batches_tracked, momentum});
}

void implement(torch::Library& m) {
  m.impl("ghost_forward", &ghost_forward);
  m.impl("ghost_backward", &ghost_backward_op);
  m.impl("ghost_update", &ghost_update_op);
  m.impl("forward", &forward_op);
  m.impl("backward", &backward_op);
  m.impl("update_running_stats", &update_running_stats_op);
  m.impl("stats", &stats);
  m.impl("gather_stats", &gather_stats_op);
  m.impl("backward_reduce", &backward_reduce_op);
  m.impl("backward_elemt", &backward_elemt_op);
}

}  // namespace

// Kernels accept any strides, and outputs follow the input. Without the tag Inductor copies arguments into the layout
// of the time of capture, at every convolution with another layout.
const std::vector<at::Tag> any_strides = {at::Tag::flexible_layout};

TORCH_LIBRARY(fastbn, m) {
  m.def(
      "forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? moments, float eps, str activation='identity', "
      "float? activation_param=None, Tensor? residual=None) -> (Tensor, Tensor)",
      any_strides);
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor moments, float eps, bool training, "
      "bool[4] output_mask, str activation='identity', float? activation_param=None, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor)",
      any_strides);
  m.def(
      "update_running_stats(Tensor moments, SymInt count, float? momentum, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor? num_batches_tracked) -> ()");
  m.def(
      "ghost_forward(Tensor input, Tensor? weight, Tensor? bias, int virtual_batch_size, float eps) -> "
      "(Tensor, Tensor)",
      any_strides);
  m.def(
      "ghost_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor moments, int virtual_batch_size, "
      "float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      any_strides);
  m.def(
      "ghost_update(Tensor moments, SymInt values, SymInt last, float? momentum, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked) -> ()");
  m.def("stats(Tensor input) -> Tensor", any_strides);
  m.def(
      "gather_stats(Tensor all_stats, float? momentum, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? num_batches_tracked) -> Tensor");
  m.def(
      "backward_reduce(Tensor grad_output, Tensor input, Tensor? weight, Tensor batch_stats, float eps, "
      "str activation='identity', float? activation_param=None, Tensor? bias=None, Tensor? residual=None) -> Tensor",
      any_strides);
  m.def(
      "backward_elemt(Tensor grad_output, Tensor input, Tensor? weight, Tensor batch_stats, Tensor total, float eps, "
      "bool wants_residual, str activation='identity', float? activation_param=None, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor, Tensor)",
      any_strides);
}

TORCH_LIBRARY_IMPL(fastbn, CPU, m) { implement(m); }
#if defined(FASTBN_CUDA)
TORCH_LIBRARY_IMPL(fastbn, CUDA, m) { implement(m); }
#endif

}  // namespace fastbn
