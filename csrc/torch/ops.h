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

// The memory format of torch's output: that of the input, or what torch suggests if it has none.
at::MemoryFormat output_format(const Tensor& input);

// Whether params have the dtype of input, or are all float32 for a half input.
bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params);

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
// var. Returns the output and what backward needs, which is undefined in eval without wants_backward. For eligible
// calls (autograd.h): validates the dtype of input alone.
std::tuple<Tensor, Saved> forward(const BatchNormArgs& args, bool wants_backward);

// Of input, weight, bias and residual; undefined if not wanted.
using Gradients = std::array<Tensor, 4>;

// Gradients of weight and bias, [2, C], and counts, [C], of a batch of which the input is a part.
struct GlobalSums {
  const double *sums = nullptr, *counts = nullptr;
};

// epilogue: without its residual if `saved` has a mask. may_overwrite: nobody else reads grad_output, so its memory can
// hold the gradient of the residual. dtype: of the gradients of weight and bias; default: that of weight.
Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                   std::array<bool, 4> wanted, const EpilogueArgs& epilogue, bool may_overwrite = false,
                   const GlobalSums& global = {}, std::optional<at::ScalarType> dtype = std::nullopt);

// Ghost batch norm (Hoffer, Hubara, Soudry 2017): chunks of chunk_size samples, each normalized by its own moments; the
// last one has the rest, and joins the one before it if it has a single value per channel.
struct ChunkSizes {
  int64_t count, size, last;  // chunks, samples in each of them, and in the last one
};
ChunkSizes ghost_chunks(at::IntArrayRef sizes, int64_t chunk_size);

// Output, and moments, float64 [chunks, 2, C].
std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t chunk_size, double eps);

// Gradients of input, weight and bias.
std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t chunk_size, double eps, std::array<bool, 3> wanted);

// Counts the batches and updates mean and var, if present, as by one chunk after the other with these moments, of
// `values` values per channel, `last` in the last chunk.
void ghost_update(const Tensor& moments, int64_t values, int64_t last, const Statistics& statistics);

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
