// Ghost batch norm: each chunk of the batch is normalized by its own statistics.
#include <ATen/Parallel.h>

#include <vector>

#include "../cpu/parallel.h"
#include "call.h"

namespace fastbn {

namespace {

// The chunks, cut along the samples: each is contiguous in both layouts.
struct Chunks : ChunkSizes<int64_t> {
  Problem whole;

  Problem problem(int64_t i) const {
    Problem p = whole;
    p.shape.N = i + 1 < count ? size : last;
    p.parts = count;
    return p;
  }
  int64_t bytes() const { return size * whole.shape.C * whole.shape.S * size_of(whole.dtype); }

  // Runs args_of(i), the arguments of chunk i without its workspace, for every chunk: one after the other on a GPU, or
  // on the CPU with few chunks; else one chunk per thread, because a chunk usually fits in its cache.
  template <class At>
  void run(Context& context, const At& args_of) const {
    // One plan for the last chunk, which may have another size, and one for the others; on a GPU one for each, because
    // chunks differ in alignment.
    std::vector<PassPlan> plans;
    for (int64_t i = 0; i < count; i += context.on_gpu() ? 1 : larger<int64_t>(1, count - 1)) {
      plans.push_back(plan(context, args_of(i)));
    }
    const auto plan_of = [&](int64_t i) -> const PassPlan& {
      return context.on_gpu() ? plans[size_t(i)] : i + 1 < count ? plans.front() : plans.back();
    };
    int64_t apart = 0;
    for (const PassPlan& p : plans) apart = larger(apart, round_up(p.workspace_bytes, 256));
    const bool side_by_side = !context.on_gpu() && count >= at::get_num_threads();
    Scratch memory(context, side_by_side ? count * apart : apart);
    const auto run_chunk = [&](int64_t i) {
      auto args = args_of(i);
      args.workspace = static_cast<char*>(memory.data()) + (side_by_side ? i * apart : 0);
      launch(context, plan_of(i), args);
    };
    if (side_by_side) {
      cpu::parallel_for(count, count * bytes(), run_chunk);
    } else {
      for (int64_t i = 0; i < count; ++i) run_chunk(i);
    }
  }
};

ChunkSizes<int64_t> chunks_of(const Tensor& input, int64_t chunk_size) {
  return ghost_chunks<int64_t>(input.size(0), positions_of(input).expect_int(), chunk_size);
}

template <class T>
T* behind(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
}

// out = kept * out + sum of weights[k] * row k; rows are C float64 values, `apart` elements apart.
void add_rows(const Output& out, double kept, const double* rows, int64_t apart, const std::vector<double>& weights,
              int64_t channels) {
  constexpr int64_t kChannelBlock = 256;  // stays in L1 while all rows are added
  dispatch_dtype(out.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t first = 0; first < channels; first += kChannelBlock) {
      T* const data = static_cast<T*>(out.data) + first;
      const int64_t number = smaller(kChannelBlock, channels - first);
      double sums[kChannelBlock];
      for (int64_t i = 0; i < number; ++i) sums[i] = kept * double(to_acc(data[i]));
      for (size_t k = 0; k < weights.size(); ++k) {
        const double weight = weights[k];
        const double* const row = rows + int64_t(k) * apart + first;
        for (int64_t i = 0; i < number; ++i) sums[i] += weight * row[i];
      }
      for (int64_t i = 0; i < number; ++i) data[i] = from_acc<T>(acc_t<T>(sums[i]));
    }
  });
}

// The sum over chunks of the gradient of a parameter, [chunks, C], rounded once.
Tensor sum_over_chunks(const Context& context, const Tensor& of_chunks, at::ScalarType dtype) {
  if (context.on_gpu()) return of_chunks.sum(0).to(dtype);
  const Tensor sum = context.empty({of_chunks.size(1)}, dtype).zero_();
  add_rows({sum.data_ptr(), dtype_of(sum)}, 1, of_chunks.const_data_ptr<double>(), of_chunks.size(1),
           std::vector<double>(size_t(of_chunks.size(0)), 1), of_chunks.size(1));
  return sum;
}

}  // namespace

c10::SymInt positions_of(const Tensor& input) {
  c10::SymInt positions = 1;
  for (const auto& size : input.sym_sizes().slice(2)) positions *= size;
  return positions;
}

std::tuple<Tensor, Tensor> ghost_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t chunk_size, double eps) {
  const ProfilerEvent event("fastbn::batch_norm", [&] { return std::vector<c10::IValue>{input, weight, bias}; });
  const int64_t channels = readable_channels(input, weight, bias, std::nullopt);
  const ChunkSizes sizes = chunks_of(input, chunk_size);

  Context context(input);
  Tensor moments = context.empty({sizes.count, 2, channels}, at::kDouble);
  if (input.numel() == 0) return {context.empty_like(input, at::MemoryFormat::Contiguous), moments.zero_()};
  const Canonical x = canonicalize(input);
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
  const Chunks chunks{sizes, x.problem};
  chunks.run(context, [&](int64_t i) {
    Forward args = whole;
    args.problem = chunks.problem(i);
    args.input = behind(whole.input, i * chunks.bytes());
    args.output = behind(whole.output, i * chunks.bytes());
    args.moments = whole.moments + i * 2 * channels;
    return args;
  });
  return {output, moments};
}

std::array<Tensor, 3> ghost_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                     const Tensor& moments, int64_t chunk_size, double eps,
                                     std::array<bool, 3> wanted) {
  const ProfilerEvent event("fastbn::batch_norm_backward",
                            [&] { return std::vector<c10::IValue>{grad_output, input, weight}; });
  const int64_t channels = readable_channels(input, weight, std::nullopt, std::nullopt, &grad_output);
  const ChunkSizes sizes = chunks_of(input, chunk_size);
  const int64_t count = sizes.count;
  check_readable_given(moments, "moments", {count, 2, channels}, input);

  Context context(input);
  Tensor dx, dw, db;  // dw and db for each chunk, so that their sum is rounded once
  if (wanted[1]) dw = context.empty({count, channels}, at::kDouble);
  if (wanted[2]) db = context.empty({count, channels}, at::kDouble);
  if (input.numel() == 0) {
    if (wanted[0]) dx = context.empty_like(input, input.suggest_memory_format());
  } else if (wanted[0] || wanted[1] || wanted[2]) {
    const Canonical x = canonicalize(input);
    const Tensor dy = contiguous_in(grad_output, x.format), given = moments.contiguous();
    if (wanted[0]) dx = context.empty_like(input, gradient_format(x.format, input));
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
    const Chunks chunks{sizes, x.problem};
    chunks.run(context, [&](int64_t i) {
      const int64_t row = i * channels * int64_t(sizeof(double));
      Backward args = whole;
      args.problem = chunks.problem(i);
      args.grad_output = behind(whole.grad_output, i * chunks.bytes());
      args.input = behind(whole.input, i * chunks.bytes());
      args.grad_input = behind(whole.grad_input, i * chunks.bytes());
      args.moments = whole.moments + i * 2 * channels;
      args.grad_weight.data = behind(whole.grad_weight.data, row);
      args.grad_bias.data = behind(whole.grad_bias.data, row);
      return args;
    });
  }
  const at::ScalarType dtype = param_dtype(input, weight);
  for (Tensor* t : {&dw, &db}) {
    if (t->defined()) *t = sum_over_chunks(context, *t, dtype);
  }
  return {dx, dw, db};
}

void ghost_update(const Tensor& moments, int64_t samples, int64_t positions, int64_t chunk_size,
                  const Statistics& statistics) {
  check_readable(moments, "moments");
  TORCH_CHECK(moments.dim() == 3, "moments should have sizes [chunks, 2, C], not ", moments.sizes());
  TORCH_CHECK_VALUE(samples >= 0 && positions >= 0, "samples and positions should not be negative, but are ", samples,
                    " and ", positions);
  int64_t total;
  TORCH_CHECK_VALUE(!__builtin_mul_overflow(samples, positions, &total),
                    "samples and positions are too large: ", samples, " and ", positions);
  const ChunkSizes chunks = ghost_chunks(samples, positions, chunk_size);
  const int64_t count = chunks.count, values = chunks.size * positions, last = chunks.last * positions;
  check_float64(moments, "moments", {count, 2, moments.size(2)});
  const int64_t channels = checked_statistics(statistics, moments, "moments");
  TORCH_CHECK_VALUE(count == 0 || (values > 1 && last > 1), "a chunk should have at least 2 values in a channel, not ",
                    smaller(values, last));

  const Context context(moments);
  if (context.on_gpu()) {
    // A cumulative average reads the counter for each chunk.
    const bool one_by_one = present(statistics.batches) && !statistics.momentum;
    if (present(statistics.batches) && !one_by_one) count_batches(*statistics.batches, count);
    for (int64_t i = 0; i < count; ++i) {
      if (one_by_one) count_batches(*statistics.batches, 1);
      update_running_stats(moments.select(0, i), i + 1 < count ? values : last, statistics);
    }
    return;
  }
  if (present(statistics.batches)) count_batches(*statistics.batches, count);
  if (!present(statistics.mean) || count == 0) return;
  RunningArgument argument(statistics, context);
  const Running& running = argument.get();
  // r <- (1 - m) r + m b for b_1 ... b_G results in (1 - m)^G r + sum of m (1 - m)^(G - i) b_i; with m = 1 / batches
  // all chunks have the same weight.
  std::vector<double> weights(size_t(count), running.momentum);
  double kept = 1 - running.momentum * double(count);
  if (statistics.momentum) {
    kept = 1;
    for (auto w = weights.rbegin(); w != weights.rend(); ++w) *w *= kept, kept *= 1 - running.momentum;
  }
  const Tensor given = moments.contiguous();
  const double* const rows = given.const_data_ptr<double>();
  add_rows(running.mean, kept, rows, 2 * channels, weights, channels);
  for (int64_t i = 0; i < count; ++i) {  // unbiased variance
    const double n = double(i + 1 < count ? values : last);
    weights[size_t(i)] *= n / (n - 1);
  }
  add_rows(running.var, kept, rows + channels, 2 * channels, weights, channels);
  argument.store();
}

}  // namespace fastbn
