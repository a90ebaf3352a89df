// The primitives of synchronized batch norm, between which torch.distributed's collectives run: stats -> all_gather ->
// finish -> forward with given moments, and grad_stats -> all_reduce -> grad_apply.
#include <ATen/ops/stack.h>

#include "call.h"

namespace fastbn {

namespace {

void check_packet(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  check_dense(t, name);
  check_device(t);
  check_memory(t, name);
  TORCH_CHECK(t.scalar_type() == at::kDouble, name, " should be float64, not ", t.scalar_type());
  TORCH_CHECK(t.sizes() == at::IntArrayRef(sizes), name, " should have sizes ", at::IntArrayRef(sizes), ", not ",
              t.sizes());
}

}  // namespace

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
  check_counter(statistics);

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
  const auto [dx, dw, db, dz] = backward(grad_output, input, weight, bias, saved, eps, true, {false, true, true, false},
                                         ending, false, {}, at::kDouble);
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
  const auto [dx, dw, db, dz] = backward(grad_output, input, weight, bias, saved, eps, true,
                                         {true, false, false, wants_residual}, ending, false, spread, std::nullopt);
  return {dx, dz};
}

}  // namespace fastbn
