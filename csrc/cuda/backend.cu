// The CUDA backend: the plan of a call on the current device, and its launches.
#include <array>
#include <map>
#include <mutex>

#include "backend.h"
#include "channel.cuh"
#include "launch.cuh"
#include "query.h"

namespace fastbn::cuda {

namespace {

// Queried once per device: a query costs as much as a launch.
const Device& device() {
  constexpr int most_devices = 64;
  static std::array<Device, most_devices> known;
  static std::array<std::once_flag, most_devices> once;
  const int index = current_device();
  if (index < 0 || index >= most_devices) throw std::runtime_error("fastbn: device index out of range");
  std::call_once(once[size_t(index)], [&] { known[size_t(index)] = current_numbers(); });
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

// The plans of all calls so far, by their keys.
class Plans {
 public:
  template <class Make>
  Plan find(const Key& key, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
    if (plans_.size() == most) plans_.clear();
    return plans_.emplace(key, make()).first->second;
  }
  void replace(const Key& key, const Plan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_[key] = plan;
  }

 private:
  static constexpr size_t most = 4096;
  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

Plans& plans() {
  static auto* const all = new Plans;  // outlives other static objects
  return *all;
}

// What a plan is made for, of forward and backward calls.
struct Call {
  Pass pass;
  bool sums;  // the outputs need sums over the batch
  bool is_aligned;
  Key key;
};

Call call_of(const Forward& args) {
  const bool is_aligned = aligned({args.input, args.output, args.epilogue.residual});
  // Without an output the reduction of the streaming strategy is all there is to do.
  const bool sums = args.training && args.output != nullptr;
  return {Pass::forward, sums, is_aligned, key_of(args, Pass::forward, sums, is_aligned, nullptr, nullptr)};
}

Call call_of(const Backward& args) {
  const bool is_aligned =
      aligned({args.grad_output, args.input, args.grad_input, args.epilogue.residual, args.grad_residual});
  // Without grad_input, or with global sums, each element is read once anyway, so one streaming launch is enough.
  const bool sums = args.training && args.grad_input != nullptr && args.global_sums == nullptr;
  return {Pass::backward, sums, is_aligned,
          key_of(args, Pass::backward, sums, is_aligned, args.mask, args.grad_residual)};
}

int64_t blocks_of(const Plan& plan, const Forward& args) { return resident_blocks_of(plan, args); }
int64_t blocks_of(const Plan& plan, const Backward& args) { return backward_resident_blocks_of(plan, args); }

// Without cooperative launches.
template <class Args>
Plan solitary_plan(const Args& args, const Call& call) {
  Device on = device();
  on.cooperative = false;
  const Plan plan = make_plan(args.problem, call.pass, call.sums, call.is_aligned, on);
  if (plan.strategy == Strategy::resident) blocks_of(plan, args);  // raises the limit of shared memory
  return plan;
}

// A plan whose kernel is ready: the limit of its shared memory is raised, and if fewer blocks are resident than the
// plan assumes, it is one without groups of blocks.
template <class Args>
Plan ready_plan(const Args& args, const Call& call) {
  Plan plan = make_plan(args.problem, call.pass, call.sums, call.is_aligned, device());
  if (plan.strategy != Strategy::resident) return plan;
  const int64_t blocks = blocks_of(plan, args);
  if (!plan.cooperative) return plan;
  const Plan solitary = solitary_plan(args, call);
  if (blocks < plan.blocks) {
    if (plan.cluster == 1) return solitary;
    Device on = device();
    on.cluster = 1;
    plan = make_plan(args.problem, call.pass, call.sums, call.is_aligned, on);
    if (plan.strategy == Strategy::resident && plan.cooperative && blocks_of(plan, args) < plan.blocks) return solitary;
    if (!plan.cooperative) return solitary;
  }
  // For without_cooperation().
  plan.workspace_bytes = larger(plan.workspace_bytes, solitary.workspace_bytes);
  plan.tickets = larger(plan.tickets, solitary.tickets);
  return plan;
}

// The plan to go on with after a cooperative launch that found no room, now and in all later calls of the kind.
template <class Args>
Plan without_cooperation(const Args& args) {
  const Call call = call_of(args);
  const Plan plan = solitary_plan(args, call);
  plans().replace(call.key, plan);
  return plan;
}

void check_mask(const void* mask, const Plan& plan) {
  if (mask != nullptr && plan.mask_bytes == 0) throw std::runtime_error("fastbn: a mask where the kernels make none");
}

__global__ void __launch_bounds__(streaming_threads)
    update_running(const double* moments, int64_t channels, double count, Running running) {
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < channels; c += int64_t(gridDim.x) * blockDim.x) {
    update(running, c, moments[c], moments[channels + c], count);
  }
}

// One block per multiprocessor is enough; with a higher bound the compiler keeps to 64 registers and spills one on
// sm_80.
__global__ void __launch_bounds__(streaming_threads, 1)
    gather_rank_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, Running running) {
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < channels; c += int64_t(gridDim.x) * blockDim.x) {
    fastbn::gather_stats(all_stats, K, channels, c, batch_stats, running);
  }
}

// The grid of a kernel with one thread per channel.
int64_t blocks_for(int64_t channels) { return smaller<int64_t>(ceil_div(channels, streaming_threads), 1024); }

}  // namespace

Geometry geometry_of(const Plan& plan, DType dtype) {
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
  g.subgroup = unsigned(plan.subgroup), g.cluster = unsigned(plan.cluster);
  g.threads = int(plan.threads), g.warps = g.threads / lanes_per_warp;
  while ((1 << g.log2_threads) < g.threads) ++g.log2_threads;
  g.lanes_per_row = int(plan.lanes_per_row), g.spans_vectors = spans_vectors(plan);
  if (plan.pattern == AccessPattern::rows) {
    g.step_rows = plan.threads / plan.vectors_per_row, g.step_vectors = plan.threads % plan.vectors_per_row;
    // Where rows end within a vector, offsets are those of rows.
    const bool whole =
        (plan.strategy == Strategy::resident || plan.vector == 1) && plan.columns_per_channel % plan.vector == 0;
    g.step_offset = g.step_rows * g.stride + (whole ? g.step_vectors * plan.vector : 0);
    g.wrap_offset = whole ? g.stride - plan.columns_per_channel : g.stride;
  } else {
    g.step_rows = plan.threads / plan.lanes_per_row;
    g.step_offset = g.step_rows * g.stride;
  }
  g.merge_lanes = lanes_per_warp;
  while (g.merge_lanes > 8 && g.merge_lanes * plan.channels_per_tile > plan.threads) g.merge_lanes /= 2;
  g.merge_channels = int(plan.threads / g.merge_lanes);
  g.merge_batch =
      int(plan.staging_bytes / int64_t(sizeof(Record)) / smaller<int64_t>(g.merge_channels, plan.channels_per_tile));
  g.records_offset = int(larger(round_up(sums_bytes(plan, dtype), 16), plan.staging_bytes));
  g.parameters_offset = g.records_offset + int(2 * plan.channels_per_tile * int64_t(sizeof(Record)));
  g.coefficients_offset = g.parameters_offset + int(plan.channels_per_tile * 3 * int64_t(sizeof(double)));
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
  const Call call = call_of(args);
  return plans().find(call.key, [&] { return ready_plan(args, call); });
}

Plan plan(const Backward& args) {
  const Call call = call_of(args);
  return plans().find(call.key, [&] { return ready_plan(args, call); });
}

void forward(const Plan& plan, const Forward& args, const Stream& stream) {
  check_mask(args.mask, plan);
  if (plan.strategy == Strategy::resident) {
    if (!launch_resident(plan, args, stream)) forward(without_cooperation(args), args, stream);
    return;
  }
  if (args.training) launch_stats(plan, args, stream);
  if (args.output != nullptr) launch_normalize(plan, args, stream);
}

void backward(const Plan& plan, const Backward& args, const Stream& stream) {
  check_mask(args.mask, plan);
  if (args.grad_input == nullptr && args.grad_residual != nullptr) {
    throw std::runtime_error("fastbn: the gradient of the residual is computed together with that of the input");
  }
  if (plan.strategy == Strategy::resident) {
    if (!launch_backward_resident(plan, args, stream)) backward(without_cooperation(args), args, stream);
    return;
  }
  if (args.global_sums == nullptr) launch_backward_reduce(plan, args, stream);
  if (args.grad_input != nullptr && args.training) launch_backward_elemt(plan, args, stream);
}

void update_running_stats(const double* moments, int64_t channels, double count, const Running& running,
                          const Stream& stream) {
  launch({blocks_for(channels), streaming_threads, 0, false, stream.handle}, update_running, moments, channels, count,
         running);
}

void gather_stats(const double* all_stats, int64_t K, int64_t channels, double* batch_stats, const Running& running,
                  const Stream& stream) {
  launch({blocks_for(channels), streaming_threads, 0, false, stream.handle}, gather_rank_stats, all_stats, K, channels,
         batch_stats, running);
}

}  // namespace fastbn::cuda
