// In: tensors of any layout. Out: a Problem for the backend, and the tensors it filled.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/stack.h>

#include "context.h"
#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"

#if defined(FASTBN_SIMT)
#include <mutex>
#endif

namespace fastbn {

namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", t.scalar_type(), "'");
  }
}

bool is_half(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

void check_dense(const Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided, "fastbn: ", name, " must be a dense tensor, but its layout is ", t.layout());
}

void check_input(const Tensor& input) {
  check_dense(input, "input");
  check_device(input);
}

void check_beside(const Tensor& t, const char* name, const Tensor& input) {
  check_dense(t, name);
  TORCH_CHECK(t.device() == input.device(), "fastbn: ", name, " is on device ", t.device(), ", but input is on device ",
              input.device());
}

void check_channels(const OptionalTensor& t, const char* name, int64_t channels, const Tensor& input) {
  if (!present(t)) return;
  check_beside(*t, name, input);
  TORCH_CHECK(t->numel() == channels, name, " should contain ", channels, " elements not ", t->numel());
}

void check_dtypes(const Tensor& input, std::initializer_list<const OptionalTensor*> params) {
  dtype_of(input);
  TORCH_CHECK(dtypes_agree(input, params), "mixed dtype: weight and bias should have the dtype of input, ",
              input.scalar_type(), ", or both be Float beside a half input");
}

void check_moments(const Tensor& moments, int64_t channels) {
  TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments should be float64, not ", moments.scalar_type());
  TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2 && moments.size(1) == channels,
              "moments should have sizes [2, ", channels, "], not ", moments.sizes());
}

int64_t channels_of(const Tensor& input) {
  TORCH_CHECK_INDEX(input.dim() >= 2, "fastbn: input should have at least 2 dimensions (N, C, ...), not ", input.dim());
  return input.size(1);
}

}  // namespace

at::MemoryFormat output_format(const Tensor& input) {
  for (const auto format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    if (input.is_contiguous(format)) return format;
  }
  return input.suggest_memory_format();
}

namespace {

// The tensor in one of the two layouts that kernels know, copied if it is in neither.
struct Folded {
  Tensor tensor;
  at::MemoryFormat format;
  Problem problem;
};

Folded fold(const Tensor& input) {
  Folded f;
  f.format = output_format(input);
  f.tensor = input.contiguous(f.format);
  const int64_t channels = input.size(1);
  const int64_t samples = input.size(0);
  f.problem.dtype = dtype_of(input);
  f.problem.shape = {samples, channels, input.numel() / (samples * channels),
                     f.format == at::MemoryFormat::Contiguous ? Layout::channels_first : Layout::channels_last};
  return f;
}

// Where both formats mean the same order in memory (one channel, say), torch's gradient has the strides of
// the one that it suggests, and its output does not.
at::MemoryFormat gradient_format(const Folded& x, const Tensor& input) {
  return x.format == at::MemoryFormat::Contiguous ? input.suggest_memory_format() : x.format;
}

// A batch that is spread over ranks: gradients of weight and bias in all of them, and how many values a channel has.
struct Spread {
  const double *total, *counts;
};

// The residual as kernels read it, in the order of x.
const void* data_of(const OptionalTensor& residual, const Folded& x, Tensor& keep) {
  if (!present(residual)) return nullptr;
  keep = residual->contiguous(x.format);
  return keep.const_data_ptr();
}

Param param(const OptionalTensor& t, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::f32};
  const Tensor& row = t->is_contiguous() ? *t : (keep = t->contiguous());
  return {row.const_data_ptr(), dtype_of(row)};
}

// Memory for one call: on the CPU's stack while it is small, else from torch's allocator.
class Scratch {
 public:
  Scratch(const Context& context, int64_t bytes) {
    if (bytes > (context.on_gpu() ? 0 : int64_t(sizeof(small_)))) large_ = context.empty({bytes}, at::kByte);
  }
  void* data() { return large_.defined() ? large_.data_ptr() : small_; }

 private:
  alignas(64) char small_[4096];
  Tensor large_;
};

int64_t workspace_bytes([[maybe_unused]] const Context& context, const Problem& problem,
                        [[maybe_unused]] cuda::Pass pass, [[maybe_unused]] bool training) {
#if defined(FASTBN_GPU)
  if (context.on_gpu()) return cuda::workspace_bytes(problem, pass, training);
#endif
  return cpu::workspace_bytes(problem);
}

// Kernels take a mask only with tensors that begin at whole vectors: another one is copied to where it does.
bool on_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

int64_t mask_bytes([[maybe_unused]] const Context& context, const Problem& problem) {
#if defined(FASTBN_GPU)
  if (context.on_gpu()) return cuda::mask_bytes(problem);
#endif
  return cpu::mask_bytes(problem);
}

#if defined(FASTBN_SIMT)
// The emulator runs one kernel at a time.
std::mutex& emulator() {
  static std::mutex mutex;
  return mutex;
}
#endif

void launch([[maybe_unused]] Context& context, const Forward& args) {
#if defined(FASTBN_SIMT)
  const std::lock_guard<std::mutex> lock(emulator());
#endif
#if defined(FASTBN_GPU)
  if (context.on_gpu()) return cuda::forward(args, args.training ? context.stream_with_counters() : context.stream());
#endif
  cpu::forward(args);
}

void launch([[maybe_unused]] Context& context, const Backward& args) {
#if defined(FASTBN_SIMT)
  const std::lock_guard<std::mutex> lock(emulator());
#endif
#if defined(FASTBN_GPU)
  if (context.on_gpu()) return cuda::backward(args, context.stream_with_counters());
#endif
  cpu::backward(args);
}

void bump_version(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Running statistics as a kernel brings them up to date, C of them in a row; others by way of a copy.
class RunningArgument {
 public:
  RunningArgument(const Statistics& statistics, const Context& context) {
    if (!present(statistics.mean)) return;
    running_.mean = take(*statistics.mean, 0);
    running_.var = take(*statistics.var, 1);
    if (statistics.momentum) {
      running_.momentum = *statistics.momentum;
    } else if (present(statistics.batches)) {
      set_cumulative(*statistics.batches, context);
    }
  }

  const Running& get() const { return running_; }

  // After the launch.
  void store() {
    for (int i = 0; i < 2; ++i) {
      if (target_[i] == nullptr) continue;
      if (copy_[i].defined()) {
        at::AutoDispatchBelowADInplaceOrView guard;
        target_[i]->copy_(copy_[i]);
      }
      bump_version(*target_[i]);
    }
  }

 private:
  Output take(const Tensor& t, int i) {
    target_[i] = &t;
    if (!t.is_contiguous()) copy_[i] = t.contiguous();
    return {(copy_[i].defined() ? copy_[i] : t).data_ptr(), dtype_of(t)};
  }

  // A counter on the GPU is read there: to read it here would wait for all the work that was queued.
  void set_cumulative(const Tensor& batches, const Context& context) {
    TORCH_CHECK(batches.numel() == 1, "num_batches_tracked should contain 1 element not ", batches.numel());
    if (context.on_gpu() && batches.device() == target_[0]->device()) {
      batches_ = batches.to(at::kLong);
      running_.batches = batches_.const_data_ptr<int64_t>();
    } else {
      running_.momentum = 1.0 / batches.item<double>();
    }
  }

  Running running_{};
  const Tensor* target_[2] = {};
  Tensor copy_[2], batches_;
};

// On the CPU exact under any number of threads; torch's += is a kernel of its own on every forward pass.
void count_batch(const Tensor& counter) {
  if (counter.is_cpu()) {
    __atomic_fetch_add(counter.data_ptr<int64_t>(), 1, __ATOMIC_RELAXED);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    counter.add_(1);
  }
  bump_version(counter);
}

// What every forward pass does once its arguments are known to be right. Fills mask if the activation has one that
// backward can use instead of the residual.
Tensor run_forward(Context& context, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const Ending& ending, Forward& args, Tensor* mask) {
  const Folded x = fold(input);
  Tensor output = context.empty_like(input, x.format);
  Tensor kept_weight, kept_bias, kept_residual;
  Scratch scratch(context, workspace_bytes(context, x.problem, cuda::Pass::forward, args.training));
  args.problem = x.problem;
  args.input = x.tensor.const_data_ptr();
  args.output = output.data_ptr();
  args.weight = param(weight, kept_weight);
  args.bias = param(bias, kept_bias);
  args.epilogue = {ending.activation, ending.param, data_of(ending.residual, x, kept_residual)};
  args.workspace = scratch.data();
  // Without a residual z is made from x again, which the backward pass reads anyway.
  if (mask != nullptr && has_mask(ending.activation) && args.epilogue.residual != nullptr && on_vector(args.input) &&
      on_vector(args.epilogue.residual)) {
    if (const int64_t bytes = mask_bytes(context, x.problem); bytes > 0) {
      *mask = context.empty({bytes}, at::kByte);
      args.mask = mask->data_ptr();
    }
  }
  launch(context, args);
  return output;
}

void check_residual(const OptionalTensor& residual, const Tensor& input) {
  if (!present(residual)) return;
  check_beside(*residual, "residual", input);
  TORCH_CHECK(residual->sizes() == input.sizes(), "residual should have the sizes of input, ", input.sizes(), ", not ",
              residual->sizes());
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "residual should have the dtype of input, ",
              input.scalar_type(), ", not ", residual->scalar_type());
}

struct NamedActivation {
  std::string_view name;
  Activation activation;
  double param;  // default; NaN: it has none
};
constexpr double none = std::numeric_limits<double>::quiet_NaN();
constexpr NamedActivation named_activations[] = {
    {"identity", Activation::identity, none},
    {"relu", Activation::relu, none},
    {"leaky_relu", Activation::leaky_relu, 0.01},
    {"relu6", Activation::relu6, none},
    {"elu", Activation::elu, 1},
    {"silu", Activation::silu, none},
    {"hardswish", Activation::hardswish, none},
    {"gelu", Activation::gelu, none},
    {"sigmoid", Activation::sigmoid, none},
    {"tanh", Activation::tanh, none},
};

}  // namespace

std::optional<Ending> ending(std::string_view activation, std::optional<double> param, const OptionalTensor& residual) {
  for (const auto& a : named_activations) {
    if (a.name != activation) continue;
    const bool has_param = a.param == a.param;
    if (param && !has_param) return std::nullopt;
    return Ending{a.activation, param.value_or(has_param ? a.param : 0), residual};
  }
  return std::nullopt;
}

std::vector<std::pair<std::string_view, double>> activations() {
  std::vector<std::pair<std::string_view, double>> all;
  for (const auto& a : named_activations) all.emplace_back(a.name, a.param);
  return all;
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

bool dtypes_agree(const Tensor& input, std::initializer_list<const OptionalTensor*> params) {
  const auto type = input.scalar_type();
  std::optional<at::ScalarType> shared;
  for (const OptionalTensor* t : params) {
    if (!present(*t)) continue;
    const auto own = (*t)->scalar_type();
    if (!(own == type || (is_half(type) && own == at::kFloat)) || shared.value_or(own) != own) return false;
    shared = own;
  }
  return true;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& moments, double eps, const Ending& ending) {
  check_input(input);
  const int64_t channels = channels_of(input);
  const bool training = !present(moments);
  check_channels(weight, "weight", channels, input);
  check_channels(bias, "bias", channels, input);
  check_dtypes(input, {&weight, &bias});
  check_residual(ending.residual, input);
  if (!training) {
    check_beside(*moments, "moments", input);
    check_moments(*moments, channels);
  }

  Context context(input);
  Tensor kept = training ? context.empty({2, channels}, at::kDouble) : moments->contiguous();
  if (input.numel() == 0) {
    return {context.empty_like(input, at::MemoryFormat::Contiguous), training ? kept.zero_() : kept};
  }
  Forward args{};
  args.training = training;
  args.eps = eps;
  if (training) {
    args.moments = kept.data_ptr<double>();
  } else {
    const double* const given = kept.const_data_ptr<double>();
    args.mean = {given, DType::f64};
    args.var = {given + channels, DType::f64};
  }
  Tensor output = run_forward(context, input, weight, bias, ending, args, nullptr);
  return {output, kept};
}

std::tuple<Tensor, Saved> forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const Statistics& statistics, bool training, double eps, const Ending& ending,
                                  bool wants_backward) {
  const int64_t channels = input.size(1);
  Context context(input);
  // Where it can, the kernel counts the batch: a launch less. Not where the momentum is made from the count.
  const bool kernel_counts = training && context.on_gpu() && statistics.batches && statistics.mean &&
                             statistics.momentum && statistics.batches->device() == input.device();
  if (statistics.batches && !kernel_counts) count_batch(*statistics.batches);
  Saved saved;
  if (training || wants_backward) saved.moments = context.empty({2, channels}, at::kDouble);
  Tensor* const mask = wants_backward ? &saved.mask : nullptr;
  Forward args{};
  args.training = training;
  args.eps = eps;
  args.moments = saved.moments.defined() ? saved.moments.data_ptr<double>() : nullptr;
  if (!training) {
    Tensor kept_mean, kept_var;
    args.mean = param(statistics.mean, kept_mean);
    args.var = param(statistics.var, kept_var);
    Tensor output = run_forward(context, input, weight, bias, ending, args, mask);
    return {output, saved};
  }
  RunningArgument running(statistics, context);
  args.running = running.get();
  if (kernel_counts) args.running.counter = statistics.batches->data_ptr<int64_t>();
  Tensor output = run_forward(context, input, weight, bias, ending, args, mask);
  running.store();
  if (kernel_counts) bump_version(*statistics.batches);
  return {output, saved};
}

namespace {

// param_dtype: of the gradients of weight and bias; theirs if there is none.
Gradients run_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                       std::array<bool, 4> wanted, const Ending& ending, bool may_overwrite, const Spread& spread,
                       std::optional<at::ScalarType> param_dtype) {
  check_input(input);
  check_beside(grad_output, "grad_output", input);
  const int64_t channels = channels_of(input);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "grad_output should have the sizes of input, ", input.sizes(),
              ", not ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output should have the dtype of input, ",
              input.scalar_type(), ", not ", grad_output.scalar_type());
  check_channels(weight, "weight", channels, input);
  check_channels(bias, "bias", channels, input);
  check_dtypes(input, {&weight, &bias});
  check_residual(ending.residual, input);
  check_beside(saved.moments, "moments", input);
  check_moments(saved.moments, channels);

  const auto own_dtype = present(weight)                ? weight->scalar_type()
                         : is_half(input.scalar_type()) ? at::kFloat
                                                        : input.scalar_type();
  Context context(input);
  Gradients grads;
  auto& [dx, dw, db, dz] = grads;
  if (wanted[1]) dw = context.empty({channels}, param_dtype.value_or(own_dtype));
  if (wanted[2]) db = context.empty({channels}, param_dtype.value_or(own_dtype));
  if (input.numel() == 0) {
    if (wanted[0]) dx = context.empty_like(input, input.suggest_memory_format());
    if (wanted[1]) dw.zero_();
    if (wanted[2]) db.zero_();
    if (wanted[3]) dz = grad_output;
    return grads;
  }
  const bool plain = ending.activation == Activation::identity;
  if (wanted[3] && plain) dz = grad_output;
  if (!wanted[0] && !wanted[1] && !wanted[2] && (plain || !wanted[3])) return grads;

  const Folded x = fold(input);
  Tensor dy = grad_output.contiguous(x.format);
  if (saved.mask.defined()) {
    const int64_t bytes = mask_bytes(context, x.problem);
    TORCH_CHECK(
        saved.mask.is_contiguous() && saved.mask.nbytes() == size_t(bytes) && saved.mask.device() == input.device(),
        "mask should have ", bytes, " bytes on ", input.device());
    if (!on_vector(dy.const_data_ptr())) dy = dy.clone();
  }
  const Tensor moments = saved.moments.contiguous();
  Tensor kept_weight, kept_bias, kept_residual;
  // Kernels make the residual's gradient on the way to the input's.
  const bool makes_dz = wanted[3] && !plain, makes_dx = wanted[0] || makes_dz;
  if (makes_dx) dx = context.empty_like(input, gradient_format(x, input));
  // Blocking dy once more changes nothing, unless it is scaled: packs may overlap, and a pass may read dy again.
  const bool in_place = saved.mask.defined() && ending.param == 0 && (may_overwrite || !dy.is_same(grad_output));
  if (makes_dz) dz = in_place ? dy : context.empty_like(input, x.format);
  const auto output = [](const Tensor& t) {
    return t.defined() ? Output{t.data_ptr(), dtype_of(t)} : Output{nullptr, DType::f32};
  };
  // Without a gradient of the input there are only sums to make, as in eval; with sums from elsewhere, only that.
  const bool both = makes_dx && spread.total == nullptr;
  Scratch scratch(context, workspace_bytes(context, x.problem, cuda::Pass::backward, training && both));
  Backward args{};
  args.problem = x.problem;
  args.grad_residual = makes_dz ? dz.data_ptr() : nullptr;  // before dy is looked at, which may be the same
  args.grad_output = dy.const_data_ptr();
  args.input = x.tensor.const_data_ptr();
  args.grad_input = output(dx).data;
  args.weight = param(weight, kept_weight);
  args.bias = param(bias, kept_bias);
  args.epilogue = {ending.activation, ending.param, plain ? nullptr : data_of(ending.residual, x, kept_residual)};
  args.mask = saved.mask.defined() ? saved.mask.const_data_ptr() : nullptr;
  args.moments = moments.const_data_ptr<double>();
  args.total = spread.total, args.counts = spread.counts;
  args.grad_weight = output(dw);
  args.grad_bias = output(db);
  args.training = training;
  args.eps = eps;
  args.workspace = scratch.data();
  launch(context, args);
  if (!wanted[0]) dx = Tensor();
  return grads;
}

}  // namespace

Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Saved& saved, double eps, bool training,
                   std::array<bool, 4> wanted, const Ending& ending, bool may_overwrite) {
  return run_backward(grad_output, input, weight, bias, saved, eps, training, wanted, ending, may_overwrite, {},
                      std::nullopt);
}

namespace {

// Both are there, beside moments or packets of C channels.
void check_running(const Statistics& statistics, int64_t channels, const Tensor& beside, const char* beside_name) {
  for (const auto& [t, name] : {std::pair(&statistics.mean, "running_mean"), {&statistics.var, "running_var"}}) {
    check_dense(**t, name);
    TORCH_CHECK((*t)->device() == beside.device(), "fastbn: ", name, " is on device ", (*t)->device(), ", but ",
                beside_name, " is on device ", beside.device());
    TORCH_CHECK((*t)->numel() == channels, name, " should contain ", channels, " elements not ", (*t)->numel());
  }
}

// [3, C], or [K, 3, C].
void check_packet(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  check_dense(t, name);
  check_device(t);
  TORCH_CHECK(t.scalar_type() == at::kDouble, name, " should be float64, not ", t.scalar_type());
  TORCH_CHECK(t.sizes() == at::IntArrayRef(sizes), name, " should have sizes ", at::IntArrayRef(sizes), ", not ",
              t.sizes());
}

}  // namespace

void update_running_stats(const Tensor& moments, int64_t count, const Statistics& statistics) {
  TORCH_CHECK_VALUE(present(statistics.mean) == present(statistics.var),
                    "running_mean and running_var must either both be None or neither be None");
  if (!present(statistics.mean)) return;
  check_dense(moments, "moments");
  check_device(moments);
  TORCH_CHECK(moments.dim() == 2, "moments should have sizes [2, C], not ", moments.sizes());
  const int64_t channels = moments.size(1);
  check_moments(moments, channels);
  check_running(statistics, channels, moments, "moments");
  TORCH_CHECK_VALUE(count >= 0, "count should be the number of values in a channel, not ", count);
  if (count == 0 || channels == 0) return;

  const Context context(moments);
  const Tensor kept = moments.contiguous();
  const double* const m = kept.const_data_ptr<double>();
  RunningArgument running(statistics, context);
#if defined(FASTBN_GPU)
  if (context.on_gpu()) {
    cuda::update_running_stats(m, channels, double(count), running.get(), context.stream());
    return running.store();
  }
#endif
  for (int64_t c = 0; c < channels; ++c) update(running.get(), c, m[c], m[channels + c], double(count));
  running.store();
}

namespace {

// The chunks of ghost batch norm, cut along the samples: each is contiguous in both layouts.
struct Chunks {
  Problem whole;
  int64_t samples, count;

  Problem problem(int64_t i) const {
    Problem p = whole;
    p.shape.N = i + 1 < count ? samples : whole.shape.N - i * samples;
    return p;
  }
  int64_t bytes() const { return samples * whole.shape.C * whole.shape.S * size_of(whole.dtype); }
  // The last one may be larger than the others, by a sample.
  int64_t workspace(const Context& context, cuda::Pass pass) const {
    const int64_t most = larger(workspace_bytes(context, problem(0), pass, true),
                                workspace_bytes(context, problem(count - 1), pass, true));
    return round_up(most, 256);
  }

  // call(i, workspace) for every chunk: one after the other on a GPU; on the CPU each in a thread of its own, where
  // there are enough of them, because what a thread needs of a chunk of usual size stays in its cache.
  template <class Call>
  void each(const Context& context, cuda::Pass pass, const Call& call) const {
    const bool side_by_side = !context.on_gpu() && count >= at::get_num_threads();
    const int64_t apart = workspace(context, pass);
    const Tensor memory = context.empty({side_by_side ? count * apart : apart}, at::kByte);
    char* const data = static_cast<char*>(memory.data_ptr());
    if (side_by_side) {
      cpu::parallel_for(count, count * bytes(), [&](int64_t i) { call(i, data + i * apart); });
    } else {
      for (int64_t i = 0; i < count; ++i) call(i, data);
    }
  }
};

template <class T>
T* behind(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
}

}  // namespace

int64_t ghost_chunks(at::IntArrayRef sizes, int64_t samples) {
  TORCH_CHECK_VALUE(samples > 0, "virtual_batch_size should be positive, not ", samples);
  const int64_t batch = sizes[0], positions = c10::multiply_integers(sizes.slice(2));
  const int64_t count = ceil_div(batch, samples);
  const bool single = count > 1 && (batch - (count - 1) * samples) * positions == 1;
  return count - single;
}

std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t samples, double eps) {
  check_input(input);
  const int64_t channels = channels_of(input);
  check_channels(weight, "weight", channels, input);
  check_channels(bias, "bias", channels, input);
  check_dtypes(input, {&weight, &bias});
  const int64_t count = ghost_chunks(input.sizes(), samples);

  Context context(input);
  Tensor moments = context.empty({count, 2, channels}, at::kDouble);
  if (input.numel() == 0) return {context.empty_like(input, at::MemoryFormat::Contiguous), moments.zero_()};
  const Folded x = fold(input);
  Tensor output = context.empty_like(input, x.format);
  Tensor kept_weight, kept_bias;
  Forward whole{};
  whole.input = x.tensor.const_data_ptr();
  whole.output = output.data_ptr();
  whole.weight = param(weight, kept_weight);
  whole.bias = param(bias, kept_bias);
  whole.moments = moments.data_ptr<double>();
  whole.training = true;
  whole.eps = eps;
  const Chunks chunks{x.problem, samples, count};
  chunks.each(context, cuda::Pass::forward, [&](int64_t i, void* workspace) {
    Forward args = whole;
    args.problem = chunks.problem(i);
    args.input = behind(whole.input, i * chunks.bytes());
    args.output = behind(whole.output, i * chunks.bytes());
    args.moments = whole.moments + i * 2 * channels;
    args.workspace = workspace;
    launch(context, args);
  });
  return {output, moments};
}

std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t samples, double eps, std::array<bool, 3> wanted) {
  check_input(input);
  check_beside(grad_output, "grad_output", input);
  check_beside(moments, "moments", input);
  const int64_t channels = channels_of(input), count = ghost_chunks(input.sizes(), samples);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "grad_output should have the sizes of input, ", input.sizes(),
              ", not ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output should have the dtype of input, ",
              input.scalar_type(), ", not ", grad_output.scalar_type());
  check_channels(weight, "weight", channels, input);
  check_dtypes(input, {&weight});
  TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments should be float64, not ", moments.scalar_type());
  TORCH_CHECK(moments.sizes() == at::IntArrayRef({count, 2, channels}), "moments should have sizes [", count, ", 2, ",
              channels, "], not ", moments.sizes());

  Context context(input);
  Tensor dx, dw, db;  // of weight and bias for each chunk, so that one rounding ends the sum over chunks
  if (wanted[1]) dw = context.empty({count, channels}, at::kDouble);
  if (wanted[2]) db = context.empty({count, channels}, at::kDouble);
  if (input.numel() == 0) {
    if (wanted[0]) dx = context.empty_like(input, input.suggest_memory_format());
  } else if (wanted[0] || wanted[1] || wanted[2]) {
    const Folded x = fold(input);
    const Tensor dy = grad_output.contiguous(x.format), given = moments.contiguous();
    if (wanted[0]) dx = context.empty_like(input, gradient_format(x, input));
    Tensor kept_weight;
    Backward whole{};
    whole.grad_output = dy.const_data_ptr();
    whole.input = x.tensor.const_data_ptr();
    whole.grad_input = dx.defined() ? dx.data_ptr() : nullptr;
    whole.weight = param(weight, kept_weight);
    whole.moments = given.const_data_ptr<double>();
    whole.grad_weight = {dw.defined() ? dw.data_ptr() : nullptr, DType::f64};
    whole.grad_bias = {db.defined() ? db.data_ptr() : nullptr, DType::f64};
    whole.training = true;
    whole.eps = eps;
    const Chunks chunks{x.problem, samples, count};
    chunks.each(context, cuda::Pass::backward, [&](int64_t i, void* workspace) {
      const int64_t row = i * channels * int64_t(sizeof(double));
      Backward args = whole;
      args.problem = chunks.problem(i);
      args.grad_output = behind(whole.grad_output, i * chunks.bytes());
      args.input = behind(whole.input, i * chunks.bytes());
      args.grad_input = behind(whole.grad_input, i * chunks.bytes());
      args.moments = whole.moments + i * 2 * channels;
      args.grad_weight.data = behind(whole.grad_weight.data, row);
      args.grad_bias.data = behind(whole.grad_bias.data, row);
      args.workspace = workspace;
      launch(context, args);
    });
  }
  const auto param_dtype = present(weight)                ? weight->scalar_type()
                           : is_half(input.scalar_type()) ? at::kFloat
                                                          : input.scalar_type();
  if (dw.defined()) dw = dw.sum(0).to(param_dtype);
  if (db.defined()) db = db.sum(0).to(param_dtype);
  return {dx, dw, db};
}

Tensor stats(const Tensor& input) {
  check_input(input);
  const int64_t channels = channels_of(input);
  dtype_of(input);
  Context context(input);
  Tensor packet = context.empty({3, channels}, at::kDouble);
  if (input.numel() == 0) return packet.zero_();
  const Folded x = fold(input);
  Scratch scratch(context, workspace_bytes(context, x.problem, cuda::Pass::forward, false));
  Forward args{};
  args.problem = x.problem;
  args.input = x.tensor.const_data_ptr();
  args.moments = packet.data_ptr<double>();
  args.training = true;
  args.eps = 1;  // of an output that is not made
  args.workspace = scratch.data();
  launch(context, args);
  packet.select(0, 2).fill_(double(x.problem.shape.per_channel()));
  return packet;
}

Tensor finish(const Tensor& packets, const Statistics& statistics) {
  TORCH_CHECK_VALUE(present(statistics.mean) == present(statistics.var),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK(packets.dim() == 3, "packets should have sizes [K, 3, C], not ", packets.sizes());
  const int64_t ranks = packets.size(0), channels = packets.size(2);
  check_packet(packets, "packets", {ranks, 3, channels});
  if (present(statistics.mean)) check_running(statistics, channels, packets, "packets");

  Context context(packets);
  const Tensor given = packets.contiguous();
  const double* const from = given.const_data_ptr<double>();
  Tensor packet = context.empty({3, channels}, at::kDouble);
  if (channels == 0) return packet;
  double* const to = packet.data_ptr<double>();
  RunningArgument running(statistics, context);
#if defined(FASTBN_GPU)
  if (context.on_gpu()) {
    cuda::finish(from, ranks, channels, to, running.get(), context.stream());
    running.store();
    return packet;
  }
#endif
  double count = 0;
  for (int64_t k = 0; k < ranks; ++k) count += from[(k * 3 + 2) * channels];
  TORCH_CHECK_VALUE(count != 1, "Expected more than 1 value per channel when training, got 1 in all ranks together");
  for (int64_t c = 0; c < channels; ++c) finish(from, ranks, channels, c, to, running.get());
  running.store();
  return packet;
}

Tensor grad_stats(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                  const OptionalTensor& bias, const Tensor& packet, double eps, const Ending& ending) {
  check_packet(packet, "packet", {3, channels_of(input)});
  const Saved saved{packet.narrow(0, 0, 2), Tensor()};
  const auto [dx, dw, db, dz] = run_backward(grad_output, input, weight, bias, saved, eps, true,
                                             {false, true, true, false}, ending, false, {}, at::kDouble);
  return at::stack({dw, db});
}

std::tuple<Tensor, Tensor> grad_apply(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const Tensor& packet, const Tensor& total, double eps,
                                      bool wants_residual, const Ending& ending) {
  const int64_t channels = channels_of(input);
  check_packet(packet, "packet", {3, channels});
  check_packet(total, "total", {2, channels});
  check_beside(total, "total", input);
  const Tensor kept = packet.contiguous(), sums = total.contiguous();
  const Spread spread{sums.const_data_ptr<double>(), kept.const_data_ptr<double>() + 2 * channels};
  const Saved saved{kept.narrow(0, 0, 2), Tensor()};
  const auto [dx, dw, db, dz] = run_backward(grad_output, input, weight, bias, saved, eps, true,
                                             {true, false, false, wants_residual}, ending, false, spread, std::nullopt);
  return {dx, dz};
}

}  // namespace fastbn
