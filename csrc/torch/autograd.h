// Batch norm as one call with an autograd node.
#pragma once

#include <functional>

#include "ops.h"

namespace fastbn {

// The backward pass that is called when it is itself differentiated, mapped or traced: grad_output, input, weight,
// bias, moments, eps, training, wanted, epilogue. Set once by Python.
using DifferentiableBackward =
    std::function<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                            double, bool, std::array<bool, 4>, const EpilogueArgs&)>;
void set_differentiable_backward(DifferentiableBackward f);

// Whether the tensor is eligible for the fast path: on a device with kernels, and not mapped, fake, traced, a dual
// number or a subclass that intercepts operators.
bool is_fast_path_tensor(const Tensor& t);

// check_memory for tensors that torch's own operations are about to read, because those do not check. Ignores tensors
// that are not strided, on other devices or wrapped (fake, mapped).
void check_memory_of_any(const Tensor& t, const char* name);

// Whether a mode (functorch, a dispatch mode, tracing) intercepts operators.
bool is_watched();

// Whether a call can take the fast path: every argument is valid and common, with (C,) parameters and statistics and
// enough values per channel. The others go to Python, which knows torch's error messages and the rarer forms. Raises
// for a tensor whose memory was freed.
bool fast_path_eligible(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, bool training, double eps,
                        const OptionalTensor& residual);

// For eligible calls with fast-path tensors outside of all modes.
Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  const EpilogueArgs& epilogue);

// DifferentiableBackward of ghost batch norm: grad_output, input, weight, moments, chunk_size, eps, wanted.
using DifferentiableGhostBackward = std::function<std::array<Tensor, 3>(
    const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t, double, std::array<bool, 3>)>;
void set_differentiable_ghost_backward(DifferentiableGhostBackward f);

// Ghost batch norm in training, under the same conditions; chunks have more than one value per channel.
Tensor ghost_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Statistics& statistics, int64_t chunk_size, double eps);

}  // namespace fastbn
