// Those of the operators fastbn::* that are functions of fastbn._C too. Operators return a tensor for every result, and
// never an argument.
#pragma once

#include <string>

#include "ops.h"

namespace fastbn {

Tensor gather_stats_op(const Tensor& all_stats, std::optional<double> momentum, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked);

Tensor backward_reduce_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                          const Tensor& batch_stats, double eps, std::string activation, std::optional<double> param,
                          const OptionalTensor& bias, const OptionalTensor& residual);

std::tuple<Tensor, Tensor> backward_elemt_op(const Tensor& grad_output, const Tensor& input,
                                             const OptionalTensor& weight, const Tensor& batch_stats,
                                             const Tensor& total, double eps, bool wants_residual,
                                             std::string activation, std::optional<double> param,
                                             const OptionalTensor& bias, const OptionalTensor& residual);

}  // namespace fastbn
