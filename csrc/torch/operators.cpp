// The operators fastbn::* of torch's dispatcher, which compiled and exported programs contain. By the name of an
// operator X one finds
//
//   schema           m.def("X(...)") at the end of this file
//   implementation   X_op or X here, which calls X of ops.h; of `batch_norm`: in Python
//   fake             X_fake here: the results' sizes, strides and dtypes, and the same exceptions
//   autograd, vmap   in Python:
//
//   batch_norm             implementation: fastbn/autograd.py batch_norm_op; a composite, whose parts have derivatives
//   forward                autograd: fastbn/autograd.py BatchNormFunction
//   backward               autograd: fastbn/autograd.py BatchNormBackward, which calls it
//   update_running_stats   vmap: fastbn/autograd.py register_update_of_each
//   ghost_forward          autograd: fastbn/functional/ghost.py ghost_forward_backward
//   ghost_backward         autograd: fastbn/functional/ghost.py differentiable_backward_of_chunks, which replaces it
//   ghost_update           vmap: fastbn/autograd.py register_update_of_each
//   stats, gather_stats, backward_reduce, backward_elemt
//                          autograd: fastbn/functional/sync.py SyncBatchNormFunction, which calls them
//
// tests/functional/test_operators.py checks this table.
#include "operators.h"

#include <ATen/Functions.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "arguments.h"

namespace fastbn {

namespace {

// An operator has to return a tensor where the function returns none, and never an argument.
Tensor own(const Tensor& gradient, const Tensor& input, const Tensor& argument = Tensor()) {
  if (!gradient.defined()) return input.new_empty({0});
  return gradient.is_same(argument) ? gradient.clone(output_format(input)) : gradient;
}

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

void ghost_update_op(const Tensor& moments, int64_t samples, int64_t positions, int64_t virtual_batch_size,
                     std::optional<double> momentum, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
  ghost_update(moments, samples, positions, virtual_batch_size,
               {running_mean, running_var, num_batches_tracked, momentum});
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

// ---- fakes ---------------------------------------------------------------------------------------------------------

using c10::SymInt;

Tensor fake_output(const Tensor& input) { return at::empty_like(input, at::TensorOptions(), output_format(input)); }

Tensor fake_grad_input(const Tensor& input) {
  const at::MemoryFormat format = output_format(input);
  return at::empty_like(input, at::TensorOptions(), gradient_format(format, input));
}

Tensor fake_row(const Tensor& input, std::vector<SymInt> sizes, at::ScalarType dtype) {
  return input.new_empty_symint(sizes, at::TensorOptions(dtype));
}

Tensor not_wanted(const Tensor& input) { return fake_row(input, {0}, input.scalar_type()); }

SymInt chunk_count(const Tensor& input, int64_t virtual_batch_size) {
  return ghost_chunks(input.sym_size(0), positions_of(input), virtual_batch_size).count;
}

std::tuple<Tensor, Tensor> forward_fake(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& moments, double, std::string, std::optional<double>,
                                        const OptionalTensor& residual) {
  const SymInt channels = checked_channels(input, weight, bias, residual);
  if (present(moments)) check_given(*moments, "moments", {moments->sym_size(0) == 3 ? 3 : 2, channels}, input);
  return {fake_output(input), fake_row(input, {2, channels}, at::kDouble)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_fake(const Tensor& grad_output, const Tensor& input,
                                                         const OptionalTensor& weight, const Tensor& moments, double,
                                                         bool, std::array<bool, 4> output_mask, std::string,
                                                         std::optional<double>, const OptionalTensor& bias,
                                                         const OptionalTensor& residual) {
  const SymInt channels = checked_channels(input, weight, bias, residual, &grad_output);
  check_given(moments, "moments", {2, channels}, input);
  const auto row = [&](bool wanted) {
    return wanted ? fake_row(input, {channels}, param_dtype(input, weight)) : not_wanted(input);
  };
  return {output_mask[0] ? fake_grad_input(input) : not_wanted(input), row(output_mask[1]), row(output_mask[2]),
          output_mask[3] ? fake_output(input) : not_wanted(input)};
}

void update_running_stats_fake(const Tensor& moments, SymInt, std::optional<double>, const Tensor& running_mean,
                               const Tensor& running_var, const OptionalTensor&) {
  check_running({running_mean, running_var, std::nullopt, std::nullopt}, moments.sym_size(-1), moments, "moments");
}

std::tuple<Tensor, Tensor> ghost_forward_fake(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, int64_t virtual_batch_size, double) {
  const SymInt channels = checked_channels(input, weight, bias);
  return {fake_output(input), fake_row(input, {chunk_count(input, virtual_batch_size), 2, channels}, at::kDouble)};
}

std::tuple<Tensor, Tensor, Tensor> ghost_backward_fake(const Tensor& grad_output, const Tensor& input,
                                                       const OptionalTensor& weight, const Tensor& moments,
                                                       int64_t virtual_batch_size, double,
                                                       std::array<bool, 3> output_mask) {
  const SymInt channels = checked_channels(input, weight, std::nullopt, std::nullopt, &grad_output);
  check_given(moments, "moments", {chunk_count(input, virtual_batch_size), 2, channels}, input);
  const auto row = [&](bool wanted) {
    return fake_row(input, {wanted ? channels : SymInt(0)}, param_dtype(input, weight));
  };
  return {output_mask[0] ? fake_grad_input(input) : not_wanted(input), row(output_mask[1]), row(output_mask[2])};
}

void ghost_update_fake(const Tensor& moments, SymInt, SymInt, int64_t, std::optional<double>,
                       const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor&) {
  check_running({running_mean, running_var, std::nullopt, std::nullopt}, moments.sym_size(-1), moments, "moments");
}

Tensor stats_fake(const Tensor& input) {
  return fake_row(input, {3, checked_channels(input, std::nullopt, std::nullopt)}, at::kDouble);
}

Tensor gather_stats_fake(const Tensor& all_stats, std::optional<double>, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor&) {
  const SymInt channels = all_stats.sym_size(-1);
  check_running({running_mean, running_var, std::nullopt, std::nullopt}, channels, all_stats, "all_stats");
  return fake_row(all_stats, {3, channels}, at::kDouble);
}

Tensor backward_reduce_fake(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                            const Tensor& batch_stats, double, std::string, std::optional<double>,
                            const OptionalTensor& bias, const OptionalTensor& residual) {
  const SymInt channels = checked_channels(input, weight, bias, residual, &grad_output);
  check_given(batch_stats, "batch_stats", {3, channels}, input);
  return fake_row(input, {2, channels}, at::kDouble);
}

std::tuple<Tensor, Tensor> backward_elemt_fake(const Tensor& grad_output, const Tensor& input,
                                               const OptionalTensor& weight, const Tensor& batch_stats,
                                               const Tensor& total, double, bool wants_residual, std::string,
                                               std::optional<double>, const OptionalTensor& bias,
                                               const OptionalTensor& residual) {
  const SymInt channels = checked_channels(input, weight, bias, residual, &grad_output);
  check_given(batch_stats, "batch_stats", {3, channels}, input);
  check_given(total, "total", {2, channels}, input);
  return {fake_grad_input(input), wants_residual ? fake_output(input) : not_wanted(input)};
}

}  // namespace

void bind_fakes(pybind11::module_& m) {
  pybind11::module_ fakes = m.def_submodule("fakes");
  fakes.def("forward", &forward_fake);
  fakes.def("backward", &backward_fake);
  fakes.def("update_running_stats", &update_running_stats_fake);
  fakes.def("ghost_forward", &ghost_forward_fake);
  fakes.def("ghost_backward", &ghost_backward_fake);
  fakes.def("ghost_update", &ghost_update_fake);
  fakes.def("stats", &stats_fake);
  fakes.def("gather_stats", &gather_stats_fake);
  fakes.def("backward_reduce", &backward_reduce_fake);
  fakes.def("backward_elemt", &backward_elemt_fake);
}

// Kernels accept any strides, and outputs follow the input. Without the tag Inductor copies arguments into the layout
// of the time of capture, at every convolution with another layout.
const std::vector<at::Tag> any_strides = {at::Tag::flexible_layout};

TORCH_LIBRARY(fastbn, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, str activation='identity', "
      "float? activation_param=None, Tensor? residual=None) -> Tensor");
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
      "ghost_update(Tensor moments, SymInt samples, SymInt positions, int virtual_batch_size, float? momentum, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked) -> ()");
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
