// Which arguments are valid, and the exceptions for those that are not, which are torch's. Nothing else judges them:
// eager calls, the slow path in Python, operators and their fakes all ask here. Sizes are SymInt where the tensors may
// be fake, mapped or traced.
#pragma once

#include "ops.h"

namespace fastbn {

inline bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Raises unless this is a valid call of batch norm. The order of the checks is torch's.
// whole_batch: false if other ranks have more of the batch, so that one value per channel is no error.
// by_kernels: false if torch's kernels compute the call, which check parameters and statistics themselves.
void validate(const BatchNormArgs& args, bool whole_batch = true, bool by_kernels = true);

// The same for tensors that the fast path accepts.
void validate_plain(const BatchNormArgs& args);

// Raises if chunks of chunk_size samples (ghost batch norm) have one value per channel.
void validate_chunks(const Tensor& input, int64_t chunk_size);

// The number of channels of an operator's tensors, if they go together. Says nothing about memory.
c10::SymInt checked_channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& residual = std::nullopt, const Tensor* grad_output = nullptr);

// Raises unless t is on the device of `other` and strided, or of the same other layout as it.
void check_placed(const Tensor& t, const char* name, const Tensor& other, const char* other_name = "input");

// Raises unless t is float64 with these sizes.
void check_float64(const Tensor& t, const char* name, c10::SymIntArrayRef sizes);

// The same for moments, or the like, on the device of the input.
void check_given(const Tensor& t, const char* name, c10::SymIntArrayRef sizes, const Tensor& input);

// Raises unless running_mean and running_var are both absent, or both fit C channels on the device of `other`.
void check_running(const Statistics& statistics, const c10::SymInt& channels, const Tensor& other,
                   const char* other_name);

// Raises for a tensor on a device without kernels in this build.
void check_device(const Tensor& input);

// The bytes of storage that the sizes and strides of a tensor need.
size_t storage_bytes(const Tensor& t);

[[noreturn]] void refuse_memory(const Tensor& t, const char* name);

// Raises, and names the argument, if the storage of a dense tensor is too small for it, as after
// untyped_storage().resize_(0), with which FSDP and offloading free the memory of live tensors.
inline void check_memory(const Tensor& t, const char* name) {
  const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (impl.numel() == 0) return;
  const c10::StorageImpl* const storage = impl.unsafe_storage().unsafeGetStorageImpl();
  const size_t needed =
      impl.is_contiguous() ? size_t(impl.storage_offset() + impl.numel()) * impl.itemsize() : storage_bytes(t);
  if (storage == nullptr || storage->data() == nullptr || storage->nbytes() < needed) refuse_memory(t, name);
}

// Raises unless kernels can read t: strided, on a device that they are built for, with its memory.
void check_readable(const Tensor& t, const char* name);

}  // namespace fastbn
