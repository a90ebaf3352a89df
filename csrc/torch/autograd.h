// In: tensors that may want gradients. Out: the whole of batch norm in one call, with its autograd node.
#pragma once

#include <functional>

#include "ops.h"

namespace fastbn {

// What a backward pass that is itself differentiated, or mapped, calls: grad_output, input, weight, bias, moments, eps,
// training, wanted, ending. Set once, by the Python module, to the autograd.Function of the backward pass.
using DifferentiableBackward =
    std::function<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                            double, bool, std::array<bool, 4>, const Ending&)>;
void set_differentiable_backward(DifferentiableBackward f);

// True if the tensor is an ordinary one of a device that has kernels: not mapped, fake, traced, a dual number
// or a subclass that sees operators.
bool is_plain(const Tensor& t);

// check_memory, before torch's own operations read a tensor of any kind: they do not look. Of those that are not
// strided and of a device that has kernels, or that are wrapped (fake, mapped), nothing is said.
void check_memory_of_any(const Tensor& t, const char* name);

// True while a mode (functorch, a dispatch mode, tracing) wants to see every operator.
bool is_watched();

// True for a call that is right in every argument and ordinary: (C,) parameters and statistics, some values
// in each channel. What is not is left to Python, which knows torch's messages and the rarer forms. Raises for a tensor
// whose memory was freed.
bool is_ordinary(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 const OptionalTensor& num_batches_tracked, bool training, double eps, const OptionalTensor& residual);

// For ordinary calls with plain tensors that nobody watches.
Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  const Ending& ending);

// Of ghost batch norm, as DifferentiableBackward: grad_output, input, weight, moments, samples in a chunk, eps, wanted.
using DifferentiableGhostBackward = std::function<std::array<Tensor, 3>(
    const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t, double, std::array<bool, 3>)>;
void set_differentiable_ghost_backward(DifferentiableGhostBackward f);

// The whole of ghost batch norm in training, for such calls; chunks of `samples` samples have more than one value.
Tensor ghost_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Statistics& statistics, int64_t samples, double eps);

}  // namespace fastbn
