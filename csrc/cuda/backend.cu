// The CUDA backend: the plan of a call on the current device, and its launches.
#include <array>
#include <mutex>

#include "channel.cuh"
#include "launch.cuh"

namespace fastbn::cuda {

namespace {

// Queried once per device: a query costs as much as a launch.
const Device& device() {
  constexpr int most_devices = 64;
  static std::array<Device, most_devices> known;
  static std::array<std::once_flag, most_devices> once;
  const int index = current_device();
  if (index < 0 || index >= most_devices) throw std::runtime_error("fastbn: device index out of range");
  std::call_once(once[size_t(index)], [&] { known[size_t(index)] = query_device(); });
  return known[size_t(index)];
}

bool aligned(std::initializer_list<const void*> tensors) {
  uintptr_t bits = 0;
  for (const void* p : tensors) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

// The plan, or one without groups of blocks if fewer of them are resident than the plan assumes.
template <class Args>
Plan plan_that_fits(const Args& args, Pass pass, bool is_aligned, int64_t (*blocks_of)(const Plan&, const Args&)) {
  const Plan plan = make_plan(args.problem, pass, args.training, is_aligned, device());
  if (!plan.cooperative || blocks_of(plan, args) * plan.multiprocessors >= plan.blocks) return plan;
  Device alone = device();
  alone.cooperative = false;
  return make_plan(args.problem, pass, args.training, is_aligned, alone);
}

void check_mask(const void* mask, const Plan& plan, DType dtype) {
  if (mask == nullptr || (plan.vector > 1 && size_of(dtype) <= 4)) return;
  throw std::runtime_error("fastbn: a mask where the kernels make none");
}

__global__ void __launch_bounds__(threads_per_block)
    update_running(const double* moments, int64_t channels, double count, Running running) {
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < channels; c += int64_t(gridDim.x) * blockDim.x) {
    update(running, c, moments[c], moments[channels + c], count);
  }
}

// One block per multiprocessor is enough; with a higher bound the compiler keeps to 64 registers and spills one on
// sm_80.
__global__ void __launch_bounds__(threads_per_block, 1)
    gather_rank_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, Running running) {
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < channels; c += int64_t(gridDim.x) * blockDim.x) {
    fastbn::gather_stats(all_stats, K, channels, c, batch_stats, running);
  }
}

// The grid of a kernel with one thread per channel.
int64_t blocks_for(int64_t channels) { return smaller<int64_t>(ceil_div(channels, threads_per_block), 1024); }

}  // namespace

Geometry geometry_of(const Plan& plan) {
  Geometry g{};
  g.stride = plan.columns;
  g.channels = plan.columns / plan.columns_per_channel;
  g.channels_per_tile = plan.channels_per_tile;
  g.columns_per_channel = plan.columns_per_channel;
  g.channel_tiles = plan.channel_tiles;
  g.batch_splits = unsigned(plan.batch_splits), g.groups = unsigned(plan.groups);
  g.count = double(plan.rows) * double(plan.columns_per_channel);
  g.inverse_count = 1 / g.count;
  g.extent = plan.pattern == AccessPattern::rows ? plan.rows * plan.vectors_per_row : plan.rows;
  g.extent_per_split = ceil_div(g.extent, plan.batch_splits);
  g.vectors_per_row = plan.vectors_per_row;
  g.step_rows = threads_per_block / plan.vectors_per_row;
  g.step_vectors = threads_per_block % plan.vectors_per_row;
  g.lanes_per_row = int(plan.lanes_per_row);
  while ((int64_t(1) << g.log2_lanes) < plan.lanes_per_row) ++g.log2_lanes;
  const int64_t columns = plan.pattern == AccessPattern::rows ? warps_per_block : plan.lanes_per_row * plan.vector;
  g.partials_offset = int(2 * columns * int64_t(sizeof(double)));
  g.coefficients_offset = g.partials_offset + int(plan.channels_per_tile * int64_t(sizeof(Moments)));
  g.slices_offset = int(plan.scratch_bytes), g.slice_bytes = int(plan.slice_bytes);
  g.multiprocessors = plan.multiprocessors, g.stagger = plan.stagger;
  return g;
}

Sums* sums_of(const Plan& plan, const Backward& args) {
  if (!args.training || args.grad_input == nullptr || args.global_sums != nullptr) return nullptr;
  char* const end = static_cast<char*>(args.workspace) + plan.workspace_bytes;
  return reinterpret_cast<Sums*>(end) - args.problem.shape.C;
}

int64_t workspace_bytes(const Problem& problem, Pass pass, bool training) {
  int64_t bytes = 0;
  Device alone = device();
  alone.cooperative = false;
  for (const bool is_aligned : {false, true}) {
    for (const Device& d : {device(), alone}) {
      bytes = larger(bytes, make_plan(problem, pass, training, is_aligned, d).workspace_bytes);
      // A training backward pass without grad_input is planned like one in eval.
      if (pass == Pass::backward) bytes = larger(bytes, make_plan(problem, pass, false, is_aligned, d).workspace_bytes);
    }
  }
  return bytes;
}

void forward(const Forward& args, const Stream& stream) {
  const bool is_aligned = aligned({args.input, args.output, args.epilogue.residual});
  if (args.output == nullptr) {
    launch_stats(make_plan(args.problem, Pass::forward, false, is_aligned, device()), args, stream);
    return;
  }
  const Plan plan = plan_that_fits(args, Pass::forward, is_aligned, resident_blocks_of);
  check_mask(args.mask, plan, args.problem.dtype);
  if (plan.strategy == Strategy::resident) {
    launch_resident(plan, args, stream);
    return;
  }
  if (args.training) launch_stats(plan, args, stream);
  launch_normalize(plan, args, stream);
}

void backward(const Backward& args, const Stream& stream) {
  const bool wants_input = args.grad_input != nullptr;
  // Without grad_input each element is read once anyway, so one streaming launch is enough.
  const bool is_aligned =
      aligned({args.grad_output, args.input, args.grad_input, args.epilogue.residual, args.grad_residual});
  const bool precomputed = args.global_sums != nullptr;
  const Plan plan = wants_input && !precomputed
                        ? plan_that_fits(args, Pass::backward, is_aligned, backward_resident_blocks_of)
                        : make_plan(args.problem, Pass::backward, false, is_aligned, device());
  check_mask(args.mask, plan, args.problem.dtype);
  if (!wants_input && args.grad_residual != nullptr) {
    throw std::runtime_error("fastbn: the gradient of the residual is computed together with that of the input");
  }
  if (plan.strategy == Strategy::resident) {
    launch_backward_resident(plan, args, stream);
    return;
  }
  if (!precomputed) launch_backward_reduce(plan, args, stream);
  if (wants_input && args.training) launch_backward_elemt(plan, args, stream);
}

void update_running_stats(const double* moments, int64_t channels, double count, const Running& running,
                          const Stream& stream) {
  launch({blocks_for(channels), threads_per_block, 0, false, stream.handle}, update_running, moments, channels, count,
         running);
}

void gather_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, const Running& running,
                  const Stream& stream) {
  launch({blocks_for(channels), threads_per_block, 0, false, stream.handle}, gather_rank_stats, all_stats, K, channels,
         batch_stats, running);
}

}  // namespace fastbn::cuda
