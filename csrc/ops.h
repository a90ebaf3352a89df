// In: tensors. Out: tensors, computed by the backend of their device; checks, allocation and layout live
// here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

namespace fastbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// True if params have the dtype of input, or are all float32 beside a half input.
bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params);

// moments: float64 [2, C], mean and biased variance; absent: those of the batch. Returns output and moments.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps);

// Gradients of input, weight and bias; undefined where mask says that nobody asked.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const OptionalTensor& weight, const Tensor& moments, double eps,
                                            bool training, std::array<bool, 3> mask);

// The running statistics as moments.
Tensor running_moments(const Tensor& running_mean, const Tensor& running_var);

// running = (1 - momentum) * running + momentum * moments, the variance unbiased for count values a channel.
// Without a momentum it is 1 / num_batches_tracked, or 0 without that.
void update_running_stats(const Tensor& moments, int64_t count, std::optional<double> momentum,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked);

}  // namespace fastbn
