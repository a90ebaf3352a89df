// In: tensors. Out: tensors, computed by the backend of their device; checks, allocation and layout live
// here.
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

// What a batch norm keeps from batch to batch. The part of the batch in the new mean and var is the momentum; without
// one it is 1 / batches, the cumulative average, or 0 without that.
struct Statistics {
  const OptionalTensor& mean;
  const OptionalTensor& var;
  const OptionalTensor& batches;
  std::optional<double> momentum;
};

// What batch norm ends with, act(z + residual), as callers give it.
struct Ending {
  Activation activation = Activation::identity;
  double param = 0;
  OptionalTensor residual;
};

// An activation by its name and the parameter of a caller; nullopt if there is no such activation, or it has no such
// parameter.
std::optional<Ending> ending(std::string_view activation, std::optional<double> param, const OptionalTensor& residual);

// The same; raises for what is none, and names those that there are.
Ending checked_ending(std::string_view activation, std::optional<double> param, const OptionalTensor& residual);

// Name and default parameter of every activation, NaN for those that have none.
std::vector<std::pair<std::string_view, double>> activations();

// Raises for a tensor of a device that this build has no kernels for, and says what to do.
void check_device(const Tensor& input);

// The bytes of storage that the sizes and strides of a tensor need.
size_t storage_bytes(const Tensor& t);

[[noreturn]] void refuse_memory(const Tensor& t, const char* name);

// Raises, and names the argument, if the storage of a dense tensor does not hold all of its elements. It does not after
// untyped_storage().resize_(0), with which FSDP and offloading free the memory of tensors that live on.
inline void check_memory(const Tensor& t, const char* name) {
  const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (impl.numel() == 0) return;
  const c10::StorageImpl* const storage = impl.unsafe_storage().unsafeGetStorageImpl();
  const size_t needed =
      impl.is_contiguous() ? size_t(impl.storage_offset() + impl.numel()) * impl.itemsize() : storage_bytes(t);
  if (storage == nullptr || storage->data() == nullptr || storage->nbytes() < needed) refuse_memory(t, name);
}

// The memory format of torch's output: the input's own, or what torch suggests for one that has none.
at::MemoryFormat output_format(const Tensor& input);

// True if params have the dtype of input, or are all float32 beside a half input.
bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params);

// Passes forward and backward, of every kind, show in torch.profiler as fastbn::batch_norm and
// fastbn::batch_norm_backward, with the sizes of their arguments.

// moments: float64 [2, C], mean and biased variance; absent: those of the batch. Returns output and moments.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps, const Ending& ending);

// What a forward pass leaves for its backward pass. mask: the backend's own, instead of the residual; undefined where z
// is to be computed once more.
struct Saved {
  Tensor moments, mask;
};

// A batch counted and normalized: in training by its own moments, with which mean and var are brought up to date; in
// eval by mean and var. Returns output and what backward needs; that is undefined in eval if nobody wants it. Checks
// nothing but the dtype of input: for calls that is_ordinary (autograd.h) was true of.
std::tuple<Tensor, Saved> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const Statistics& statistics, bool training, double eps, const Ending& ending,
                                  bool wants_backward);

// In this order everywhere: of input, weight, bias and residual; undefined where nobody wanted one.
using Gradients = std::array<Tensor, 4>;

// A batch that is spread over ranks: how many values a channel has, and gradients of weight and bias in all of them.
struct Spread {
  const double *total = nullptr, *counts = nullptr;
};

// ending without its residual where there is a mask for it in `saved`. may_overwrite: nobody else will look at
// grad_output, so that the residual's gradient can take its memory.
// param_dtype: of the gradients of weight and bias; absent: that of weight, or the one that it would have.
Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                   std::array<bool, 4> wanted, const Ending& ending, bool may_overwrite = false,
                   const Spread& spread = {}, std::optional<at::ScalarType> param_dtype = std::nullopt);

// Ghost batch norm (Hoffer, Hubara, Soudry 2017): chunks of `samples` samples, each normalized by its own moments; the
// last one has what is left, and one that would have a single value a channel joins the one before it.
struct ChunkSizes {
  int64_t count, samples, last;  // samples in every chunk but the last, and in that one
};
ChunkSizes ghost_chunks(at::IntArrayRef sizes, int64_t samples);

// Output, and moments, float64 [chunks, 2, C].
std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t samples, double eps);

// Gradients of input, weight and bias.
std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t samples, double eps, std::array<bool, 3> wanted);

// Batches counted, and mean and var, if they are there, brought up to date as by one chunk after the other, which had
// these moments; of `values` values a channel, the last chunk of `last`.
void ghost_update(const Tensor& moments, int64_t values, int64_t last, const Statistics& statistics);

// mean and var brought up to date with moments of count values a channel; the variance unbiased.
void update_running_stats(const Tensor& moments, int64_t count, const Statistics& statistics);

// ---- a batch that is spread over ranks: what each does between the two collectives of a pass -----------------------

// float64 [3, C]: mean, biased variance and count of the values of each channel; zeros for an input without elements.
Tensor stats(const Tensor& input);

// The same of all packets [K, 3, C] together, merged in their order; mean and var brought up to date with it.
Tensor finish(const Tensor& packets, const Statistics& statistics);

// float64 [2, C]: the gradients of weight and bias, of which the packet of all ranks makes those of the input.
Tensor grad_stats(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                  const OptionalTensor& bias, const Tensor& packet, double eps, const Ending& ending);

// Gradients of input and residual (undefined if not wanted) from the packet that `finish` made, and from what
// `grad_stats` made, summed over all ranks.
std::tuple<Tensor, Tensor> grad_apply(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const Tensor& packet, const Tensor& total, double eps,
                                      bool wants_residual, const Ending& ending);

}  // namespace fastbn
