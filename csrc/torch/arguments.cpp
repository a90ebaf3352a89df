#include "arguments.h"

#include <Python.h>

#include "call.h"

namespace fastbn {

namespace {

struct NamedTensor {
  const OptionalTensor& tensor;
  const char* name;
};

// Sizes of a tensor that may be of any kind are SymInt; those of plain ones int64_t, which takes 2 % less of the
// smallest calls.
template <class Int>
auto sizes_of(const Tensor& t) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return t.sizes();
  } else {
    return t.sym_sizes();
  }
}

template <class Int>
Int numel_of(const Tensor& t) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return t.numel();
  } else {
    return t.sym_numel();
  }
}

// As Python prints it. The caller holds the GIL.
std::string repr(double value) {
  char* const text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  std::string result = text;
  PyMem_Free(text);
  return result;
}

void check_dense(const Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided, "fastbn: ", name, " must be a dense tensor, but its layout is ", t.layout());
}

void check_device_of(const Tensor& t, const char* name, at::Device device, const char* other_name) {
  TORCH_CHECK(t.device() == device, "batch_norm(): ", name, " is on device ", t.device(), ", but ", other_name,
              " is on device ", device);
}

// Raises unless t has one value for each channel and is on the device of `other_name`.
template <class Int>
void check_per_channel(const Tensor& t, const char* name, const Int& channels, at::Device device,
                       const char* other_name = "input") {
  check_device_of(t, name, device, other_name);
  TORCH_CHECK(numel_of<Int>(t) == channels, name, " should contain ", channels, " elements not ", numel_of<Int>(t));
}

// Raises unless params have the dtype of input, or are all float32 for a half input.
void check_dtypes(const Tensor& input, std::initializer_list<NamedTensor> params) {
  const auto type = input.scalar_type();
  std::optional<at::ScalarType> shared;
  for (const auto& [t, name] : params) {
    if (!present(t)) continue;
    const auto own = t->scalar_type();
    TORCH_CHECK((own == type || (is_half(type) && own == at::kFloat)) && shared.value_or(own) == own,
                "mixed dtype: parameters and statistics should have the dtype of input, ", type,
                ", or all be Float beside a half input, but ", name, " is ", own);
    shared = own;
  }
}

template <class Int>
void check_like_input(const Tensor& t, const char* name, const Tensor& input) {
  check_placed(t, name, input);
  TORCH_CHECK(sizes_of<Int>(t) == sizes_of<Int>(input), name, " should have the sizes of input, ", sizes_of<Int>(input),
              ", not ", sizes_of<Int>(t));
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), name, " should have the dtype of input, ", input.scalar_type(),
              ", not ", t.scalar_type());
}

// What torch.nn.functional.batch_norm checks before it looks at the tensors.
template <class Int>
void check_numbers(const BatchNormArgs& args, bool whole_batch) {
  if (!args.training) {
    TORCH_CHECK_VALUE(!(args.eps < 0), "batch_norm eps must be non-negative, but got ", repr(args.eps));
    return;
  }
  const auto sizes = sizes_of<Int>(args.input);
  TORCH_CHECK_INDEX(!sizes.empty(), "tuple index out of range");
  if (whole_batch) {
    bool one_value = sizes[0] == 1;
    for (size_t i = 2; i < sizes.size() && one_value; ++i) one_value = sizes[i] == 1;
    TORCH_CHECK_VALUE(!one_value, "Expected more than 1 value per channel when training, got input size torch.Size(",
                      sizes, ")");
  }
  TORCH_CHECK_VALUE(!(args.eps <= 0), "batch_norm eps must be positive during training, but got ", repr(args.eps));
}

template <class Int>
void validate_as(const BatchNormArgs& args, bool whole_batch, bool by_kernels) {
  const Tensor& input = args.input;
  check_numbers<Int>(args, whole_batch);
  if (present(args.epilogue.residual)) check_like_input<Int>(*args.epilogue.residual, "residual", input);
  if (!by_kernels || numel_of<Int>(input) == 0) return;

  const OptionalTensor &mean = args.running_mean, &var = args.running_var;
  TORCH_CHECK_VALUE(!args.training || present(mean) == present(var),
                    "running_mean and running_var must either both be None or neither be None");
  const at::Device device = input.device();
  const Int channels = input.dim() > 1 ? sizes_of<Int>(input)[1] : Int(0);  // as in torch
  for (const auto& [t, name] : {NamedTensor{mean, "running_mean"}, {var, "running_var"}}) {
    TORCH_CHECK(args.training || present(t), name, " must be defined in evaluation mode");
    if (!present(t)) continue;
    check_per_channel(*t, name, channels, device);
    TORCH_CHECK(!t->requires_grad(),
                "batch_norm is not differentiable with respect to running_mean and running_var: they cannot have "
                "requires_grad True");
  }
  for (const auto& [t, name] : {NamedTensor{args.weight, "weight"}, {args.bias, "bias"}}) {
    if (present(t)) check_per_channel(*t, name, channels, device);
  }
  if (!device.is_meta()) check_device(input);
  dtype_of(input);
  check_dtypes(input, {{mean, "running_mean"}, {var, "running_var"}, {args.weight, "weight"}, {args.bias, "bias"}});
  TORCH_CHECK_INDEX(input.dim() >= 2, "Dimension out of range (expected to be in range of [-1, 0], but got 1)");
}

}  // namespace

void check_placed(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  if (t.layout() != other.layout()) check_dense(t, name);  // both may be of mkldnn, whose batch norm is torch's
  check_device_of(t, name, other.device(), other_name);
}

void validate(const BatchNormArgs& args, bool whole_batch, bool by_kernels) {
  validate_as<c10::SymInt>(args, whole_batch, by_kernels);
}

void validate_plain(const BatchNormArgs& args) { validate_as<int64_t>(args, true, true); }

void validate_chunks(const Tensor& input, int64_t chunk_size) {
  if (chunk_size != 1) return;
  TORCH_CHECK_VALUE(input.sym_numel() != input.sym_size(0) * input.sym_size(1),
                    "virtual_batch_size 1 leaves one value per channel in a chunk of an input of sizes ",
                    input.sym_sizes());
}

c10::SymInt checked_channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& residual, const Tensor* grad_output) {
  check_dense(input, "input");
  TORCH_CHECK_INDEX(input.dim() >= 2, "fastbn: input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  const c10::SymInt channels = input.sym_size(1);
  if (grad_output != nullptr) check_like_input<c10::SymInt>(*grad_output, "grad_output", input);
  for (const auto& [t, name] : {NamedTensor{weight, "weight"}, {bias, "bias"}}) {
    if (!present(t)) continue;
    check_dense(*t, name);
    check_per_channel(*t, name, channels, input.device());
  }
  dtype_of(input);
  check_dtypes(input, {{weight, "weight"}, {bias, "bias"}});
  if (present(residual)) check_like_input<c10::SymInt>(*residual, "residual", input);
  return channels;
}

void check_float64(const Tensor& t, const char* name, c10::SymIntArrayRef sizes) {
  TORCH_CHECK(t.scalar_type() == at::kDouble, name, " should be float64, not ", t.scalar_type());
  TORCH_CHECK(t.sym_sizes() == sizes, name, " should have sizes ", sizes, ", not ", t.sym_sizes());
}

void check_given(const Tensor& t, const char* name, c10::SymIntArrayRef sizes, const Tensor& input) {
  check_placed(t, name, input);
  check_float64(t, name, sizes);
}

void check_running(const Statistics& statistics, const c10::SymInt& channels, const Tensor& other,
                   const char* other_name) {
  TORCH_CHECK_VALUE(present(statistics.mean) == present(statistics.var),
                    "running_mean and running_var must either both be None or neither be None");
  if (!present(statistics.mean)) return;
  for (const auto& [t, name] : {NamedTensor{statistics.mean, "running_mean"}, {statistics.var, "running_var"}}) {
    check_dense(*t, name);
    check_per_channel(*t, name, channels, other.device(), other_name);
  }
}

size_t storage_bytes(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), size_t(t.storage_offset()));
}

void refuse_memory(const Tensor& t, const char* name) {
  TORCH_CHECK(false, "fastbn: the memory of ", name, " was freed, or is too small: its sizes ", t.sizes(),
              " and strides ", t.strides(), " need a storage of ", storage_bytes(t), " bytes, but it has ",
              t.storage().nbytes());
}

void check_readable(const Tensor& t, const char* name) {
  check_dense(t, name);
  check_device(t);
  check_memory(t, name);
}

void check_device(const Tensor& input) {
  TORCH_CHECK(has_kernels(input.device()), "fastbn: input is on ", input.device(),
              ", and this build of fastbn has kernels for ",
#if defined(FASTBN_CUDA)
              "CPU and CUDA only. Move the model there, or use torch.nn's batch norm."
#else
              "the CPU only. Use torch.nn's batch norm there, or build fastbn with CUDA, where nvcc and a torch for"
              " CUDA are: FASTBN_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps fastbn"
#endif
  );
}

}  // namespace fastbn
