// In: tensors, as an operator of torch has them. Out: tensors: nothing is absent, and none is an argument. Of the
// operators fastbn::* those that are functions of fastbn._C as well.
#pragma once

#include <string>

#include "ops.h"

namespace fastbn {

Tensor finish_op(const Tensor& packets, std::optional<double> momentum, const OptionalTensor& running_mean,
                 const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked);

Tensor grad_stats_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& packet,
                     double eps, std::string activation, std::optional<double> param, const OptionalTensor& bias,
                     const OptionalTensor& residual);

std::tuple<Tensor, Tensor> grad_apply_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                         const Tensor& packet, const Tensor& total, double eps, bool wants_residual,
                                         std::string activation, std::optional<double> param,
                                         const OptionalTensor& bias, const OptionalTensor& residual);

}  // namespace fastbn
