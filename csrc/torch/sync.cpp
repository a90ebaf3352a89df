// The primitives of synchronized batch norm, between which torch.distributed's collectives run: stats -> all_gather ->
// gather_stats -> forward with given moments, and backward_reduce -> all_reduce -> backward_elemt.
#include <ATen/ops/stack.h>

#include "call.h"

namespace fastbn {

Tensor stats(const Tensor& input) {
  const int64_t channels = readable_channels(input, std::nullopt, std::nullopt, std::nullopt);
  Context context(input);
  Tensor batch_stats = context.empty({3, channels}, at::kDouble);
  if (input.numel() == 0) return batch_stats.zero_();
  const Canonical x = canonicalize(input);
  Forward args{};
  args.problem = x.problem;
  args.input = x.tensor.const_data_ptr();
  args.moments = batch_stats.data_ptr<double>();
  args.training = true;
  args.eps = 1;  // unused: there is no output
  const PassPlan plan = fastbn::plan(context, args);
  Scratch scratch(context, plan.workspace_bytes);
  args.workspace = scratch.data();
  launch(context, plan, args);
  batch_stats.select(0, 2).fill_(double(x.problem.shape.per_channel()));
  return batch_stats;
}

Tensor gather_stats(const Tensor& all_stats, const Statistics& statistics) {
  check_readable(all_stats, "all_stats");
  TORCH_CHECK(all_stats.dim() == 3, "all_stats should have sizes [K, 3, C], not ", all_stats.sizes());
  const int64_t ranks = all_stats.size(0);
  check_float64(all_stats, "all_stats", {ranks, 3, all_stats.size(2)});
  const int64_t channels = checked_statistics(statistics, all_stats, "all_stats");

  Context context(all_stats);
  const Tensor given = all_stats.contiguous();
  const double* const from = given.const_data_ptr<double>();
  Tensor batch_stats = context.empty({3, channels}, at::kDouble);
  if (channels == 0) return batch_stats;
  double* const to = batch_stats.data_ptr<double>();
  RunningArgument running(statistics, context);
#if defined(FASTBN_GPU)
  if (context.on_gpu()) {
    cuda::gather_stats(from, ranks, channels, to, running.get(), context.stream());
    running.store();
    return batch_stats;
  }
#endif
  double count = 0;
  for (int64_t k = 0; k < ranks; ++k) count += from[(k * 3 + 2) * channels];
  TORCH_CHECK_VALUE(count != 1, "Expected more than 1 value per channel when training, got 1 in all ranks together");
  for (int64_t c = 0; c < channels; ++c) gather_stats(from, ranks, channels, c, to, running.get());
  running.store();
  return batch_stats;
}

Tensor backward_reduce(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& batch_stats, double eps,
                       const EpilogueArgs& epilogue) {
  const int64_t channels = readable_channels(input, weight, bias, epilogue.residual, &grad_output);
  check_readable_given(batch_stats, "batch_stats", {3, channels}, input);
  const Saved saved{batch_stats.narrow(0, 0, 2), Tensor()};
  const auto [dx, dw, db, dz] = run_backward(grad_output, input, weight, bias, saved, eps, true,
                                             {false, true, true, false}, epilogue, false, {}, at::kDouble);
  return at::stack({dw, db});
}

std::tuple<Tensor, Tensor> backward_elemt(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const Tensor& batch_stats, const Tensor& total,
                                          double eps, bool wants_residual, const EpilogueArgs& epilogue) {
  const int64_t channels = readable_channels(input, weight, bias, epilogue.residual, &grad_output);
  check_readable_given(batch_stats, "batch_stats", {3, channels}, input);
  check_readable_given(total, "total", {2, channels}, input);
  const Tensor kept = batch_stats.contiguous(), sums = total.contiguous();
  const GlobalSums global{sums.const_data_ptr<double>(), kept.const_data_ptr<double>() + 2 * channels};
  const Saved saved{kept.narrow(0, 0, 2), Tensor()};
  const auto [dx, dw, db, dz] =
      run_backward(grad_output, input, weight, bias, saved, eps, true, {true, false, false, wants_residual}, epilogue,
                   false, global, at::kDouble);
  return {dx, dz};
}

}  // namespace fastbn
