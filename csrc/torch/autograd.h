// Batch norm as one call with an autograd node.
#pragma once

#include "ops.h"

namespace fastbn {

// Whether the tensor is eligible for the fast path: on a device with kernels, and not mapped, fake, traced, a dual
// number or a subclass that intercepts operators.
bool is_fast_path_tensor(const Tensor& t);

// check_memory for tensors that torch's own operations are about to read, because those do not check. Ignores tensors
// that are not strided, on other devices or wrapped (fake, mapped).
void check_memory_of_any(const Tensor& t, const char* name);

// Whether a mode (functorch, a dispatch mode, tracing) intercepts operators.
bool is_watched();

// Whether a call can take the fast path: it is valid (arguments.h) and of a common form, with elements and (C,)
// parameters and statistics. The others take the slow path, which validates them again and raises. Raises for a tensor
// whose memory was freed.
bool fast_path_eligible(const BatchNormArgs& args);

// For eligible calls with fast-path tensors outside of all modes.
Tensor batch_norm(const BatchNormArgs& args);

// Ghost batch norm in training, under the same conditions; chunks have more than one value per channel.
Tensor ghost_batch_norm(const BatchNormArgs& args, int64_t chunk_size);

}  // namespace fastbn
