// The CUDA backend: the plan of a call on the current device, and its launches.
#include <array>
#include <map>
#include <mutex>

#include "backend.h"
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

// What a plan depends on: device, shape, and in one word dtype, layout, pass and what selects the kernel.
using Key = std::array<int64_t, 5>;

template <class Args>
Key key_of(const Args& args, Pass pass, bool sums, bool is_aligned, const void* mask, const void* grad_residual) {
  const Problem& p = args.problem;
  int64_t word = int64_t(args.epilogue.activation);
  for (const int64_t part : {int64_t(p.dtype), int64_t(p.shape.layout)}) word = word << 2 | part;
  for (const bool bit : {pass == Pass::backward, sums, is_aligned, args.epilogue.residual != nullptr, mask != nullptr,
                         grad_residual != nullptr}) {
    word = word << 1 | int64_t(bit);
  }
  return {current_device(), p.shape.N, p.shape.C, p.shape.S, word};
}

// A plan whose kernel is ready: the limit of its shared memory is raised, and if fewer blocks are resident than the
// plan assumes, it is one without groups of blocks. `sums`: the outputs need sums over the batch.
template <class Args>
Plan ready_plan(const Args& args, Pass pass, bool sums, bool is_aligned,
                int64_t (*resident_blocks)(const Plan&, const Args&)) {
  Device on = device();
  Plan plan = make_plan(args.problem, pass, sums, is_aligned, on);
  if (plan.strategy != Strategy::resident) return plan;
  const int64_t blocks = resident_blocks(plan, args);
  if (!plan.cooperative || blocks * plan.multiprocessors >= plan.blocks) return plan;
  on.cooperative = false;
  plan = make_plan(args.problem, pass, sums, is_aligned, on);
  if (plan.strategy == Strategy::resident) resident_blocks(plan, args);
  return plan;
}

template <class Make>
Plan cached(const Key& key, const Make& make) {
  constexpr size_t max_plans = 4096;
  static std::mutex mutex;
  static auto* const plans = new std::map<Key, Plan>;  // outlives other static objects
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = plans->find(key); found != plans->end()) return found->second;
  if (plans->size() == max_plans) plans->clear();
  return plans->emplace(key, make()).first->second;
}

void check_mask(const void* mask, const Plan& plan) {
  if (mask != nullptr && plan.mask_bytes == 0) throw std::runtime_error("fastbn: a mask where the kernels make none");
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

Plan plan(const Forward& args) {
  const bool is_aligned = aligned({args.input, args.output, args.epilogue.residual});
  // Without an output the reduction of the streaming strategy is all there is to do.
  const bool sums = args.training && args.output != nullptr;
  return cached(key_of(args, Pass::forward, sums, is_aligned, nullptr, nullptr),
                [&] { return ready_plan(args, Pass::forward, sums, is_aligned, resident_blocks_of); });
}

Plan plan(const Backward& args) {
  const bool is_aligned =
      aligned({args.grad_output, args.input, args.grad_input, args.epilogue.residual, args.grad_residual});
  // Without grad_input, or with global sums, each element is read once anyway, so one streaming launch is enough.
  const bool sums = args.training && args.grad_input != nullptr && args.global_sums == nullptr;
  return cached(key_of(args, Pass::backward, sums, is_aligned, args.mask, args.grad_residual),
                [&] { return ready_plan(args, Pass::backward, sums, is_aligned, backward_resident_blocks_of); });
}

void forward(const Plan& plan, const Forward& args, const Stream& stream) {
  check_mask(args.mask, plan);
  if (plan.strategy == Strategy::resident) return launch_resident(plan, args, stream);
  if (args.training) launch_stats(plan, args, stream);
  if (args.output != nullptr) launch_normalize(plan, args, stream);
}

void backward(const Plan& plan, const Backward& args, const Stream& stream) {
  check_mask(args.mask, plan);
  if (args.grad_input == nullptr && args.grad_residual != nullptr) {
    throw std::runtime_error("fastbn: the gradient of the residual is computed together with that of the input");
  }
  if (plan.strategy == Strategy::resident) return launch_backward_resident(plan, args, stream);
  if (args.global_sums == nullptr) launch_backward_reduce(plan, args, stream);
  if (args.grad_input != nullptr && args.training) launch_backward_elemt(plan, args, stream);
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
