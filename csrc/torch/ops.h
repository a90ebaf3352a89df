// Batch norm on tensors: validation, allocation and layouts around the backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../core/problem.h"

namespace fastbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The running statistics of a batch norm. Without a momentum it is 1 / batches, the cumulative average, or 0 without
// batches.
struct Statistics {
  const OptionalTensor& mean;
  const OptionalTensor& var;
  const OptionalTensor& batches;
  std::optional<double> momentum;
};

// The epilogue act(z + residual) as callers give it.
struct EpilogueArgs {
  Activation activation = Activation::identity;
  double param = 0;
  OptionalTensor residual;
};

// The epilogue for the name of an activation and its parameter; nullopt if there is no such activation, or it has no
// parameter.
std::optional<EpilogueArgs> find_epilogue(std::string_view activation, std::optional<double> param,
                                          const OptionalTensor& residual);

// The name of its activation and the parameter in Python: nullopt for activations without one.
std::string_view name_of(const EpilogueArgs& epilogue);
std::optional<double> param_of(const EpilogueArgs& epilogue);

// find_epilogue, but raises an error that names the activations.
EpilogueArgs parse_epilogue(std::string_view activation, std::optional<double> param, const OptionalTensor& residual);

// Name and default parameter of every activation; NaN if it has none.
std::vector<std::pair<std::string_view, double>> activations();

// The dtype of the gradients of weight and bias: that of weight, or float32 for a half input without a weight.
at::ScalarType param_dtype(at::ScalarType input, std::optional<at::ScalarType> weight);
at::ScalarType param_dtype(const Tensor& input, const OptionalTensor& weight);

// The memory format of torch's output: that of the input, or what torch suggests if it has none.
at::MemoryFormat output_format(const Tensor& input);

// The memory format of the gradient of an input whose output has `format`. If both formats describe the same memory
// order (one channel, for example), torch's gradient has the strides of the suggested format while its output does not.
at::MemoryFormat gradient_format(at::MemoryFormat format, const Tensor& input);

// All forward and backward passes appear in torch.profiler as fastbn::batch_norm and fastbn::batch_norm_backward, with
// the sizes of their arguments.

// moments: float64 [2, C], mean and biased variance; absent: those of the batch. Returns output and moments.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps, const EpilogueArgs& epilogue);

// What a forward pass saves for its backward pass. mask: used instead of the residual; undefined if z is recomputed.
struct Saved {
  Tensor moments, mask;
};

// The arguments of a batch norm, in the order of Python's.
struct BatchNormArgs {
  Tensor input;
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  bool training = true;
  std::optional<double> momentum;
  double eps = 0;
  EpilogueArgs epilogue;

  Statistics statistics() const { return {running_mean, running_var, num_batches_tracked, momentum}; }
};

// Counts and normalizes a batch: in training by its own moments, which also update mean and var, in eval by mean and
// var. Returns the output and what backward needs, which is undefined in eval without wants_backward. Validates
// nothing: for calls that fast_path_eligible (autograd.h) accepted.
std::tuple<Tensor, Saved> forward(const BatchNormArgs& args, bool wants_backward);

// Of input, weight, bias and residual; undefined if not wanted.
using Gradients = std::array<Tensor, 4>;

// epilogue: without its residual if `saved` has a mask. may_overwrite: nobody else reads grad_output, so its memory can
// hold the gradient of the residual.
Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                   std::array<bool, 4> wanted, const EpilogueArgs& epilogue, bool may_overwrite = false);

// Ghost batch norm (Hoffer, Hubara, Soudry 2017): chunks of chunk_size samples, each normalized by its own moments; the
// last one has the rest, and joins the one before it if it has a single value per channel.
template <class Int>  // int64_t, or SymInt for fake tensors
struct ChunkSizes {
  Int count, size, last;  // chunks, samples in each of them, and in the last one
};

// samples: of the batch; positions: values of a channel in one sample.
template <class Int>
ChunkSizes<Int> ghost_chunks(const Int& samples, const Int& positions, int64_t chunk_size) {
  TORCH_CHECK_VALUE(chunk_size > 0, "virtual_batch_size should be positive, not ", chunk_size);
  Int count = 0;
  if (samples != 0) count = (samples - 1) / chunk_size + 1;  // no overflow for the largest chunk_size
  if (count > 1 && (samples - (count - 1) * chunk_size) * positions == 1) count = count - 1;
  if (count < 2) return {count, samples, samples};
  return {count, chunk_size, samples - (count - 1) * chunk_size};
}

// The values of a channel in one sample: the product of the sizes behind the channels.
c10::SymInt positions_of(const Tensor& input);

// Output, and moments, float64 [chunks, 2, C].
std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t chunk_size, double eps);

// Gradients of input, weight and bias.
std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t chunk_size, double eps, std::array<bool, 3> wanted);

// Counts the batches and updates mean and var, if present, as by one chunk after the other of a batch of `samples` with
// these moments.
void ghost_update(const Tensor& moments, int64_t samples, int64_t positions, int64_t chunk_size,
                  const Statistics& statistics);

// Updates mean and var with moments of count values per channel.
void update_running_stats(const Tensor& moments, int64_t count, const Statistics& statistics);

// ---- synchronized batch norm: what each rank does between the collectives ------------------------------------------

// BatchStats, float64 [3, C]: mean, biased variance and count of each channel; zeros for an empty input.
Tensor stats(const Tensor& input);

// Merges the BatchStats of K ranks, [K, 3, C], in their order; updates mean and var with them.
Tensor gather_stats(const Tensor& all_stats, const Statistics& statistics);

// float64 [2, C]: the gradients of weight and bias of this part, given the BatchStats of all ranks.
Tensor backward_reduce(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& batch_stats, double eps, const EpilogueArgs& epilogue);

// Gradients of input and residual (undefined if not wanted) from the BatchStats of all ranks and the sum over ranks of
// backward_reduce.
std::tuple<Tensor, Tensor> backward_elemt(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const Tensor& batch_stats, const Tensor& total,
                                          double eps, bool wants_residual, const EpilogueArgs& epilogue);

}  // namespace fastbn
