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

// What a batch norm keeps from batch to batch. The part of the batch in the new mean and var is the momentum; without
// one it is 1 / batches, the cumulative average, or 0 without that.
struct Statistics {
  const OptionalTensor& mean;
  const OptionalTensor& var;
  const OptionalTensor& batches;
  std::optional<double> momentum;
};

// Raises for a tensor of a device that this build has no kernels for, and says what to do.
void check_device(const Tensor& input);

// True if params have the dtype of input, or are all float32 beside a half input.
bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params);

// moments: float64 [2, C], mean and biased variance; absent: those of the batch. Returns output and moments.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps);

// A batch counted and normalized: in training by its own moments, with which mean and var are brought up to date; in
// eval by mean and var. Returns output and moments; those are undefined in eval if nobody wants them. Checks nothing
// but the dtype of input: for calls that is_ordinary (autograd.h) was true of.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const Statistics& statistics, bool training, double eps, bool wants_moments);

// Gradients of input, weight and bias; undefined where mask says that nobody asked.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const OptionalTensor& weight, const Tensor& moments, double eps,
                                            bool training, std::array<bool, 3> mask);

// mean and var brought up to date with moments of count values a channel; the variance unbiased.
void update_running_stats(const Tensor& moments, int64_t count, const Statistics& statistics);

}  // namespace fastbn
