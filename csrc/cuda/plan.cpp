// In: a Problem and what is known of a GPU. Out: the Plan, with the reason beside each constant. No GPU has measured
// them yet: they are assumed, from a simulation of an H200, and name the measurement of benchmarks/probe.cu that
// decides.
#include "plan.h"

#include <initializer_list>

namespace fastbn::cuda {

namespace {

constexpr int64_t kilobyte = 1 << 10;
constexpr int64_t warps = threads_a_block / 32;
constexpr int64_t most_lanes = 128;  // 1024 columns of sums in double are 16 KB of shared memory

int64_t at_least(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// What fits how: the part of a plan that does not depend on the GPU.
struct Cut {
  Walk walk;
  int64_t vector, rows, columns, columns_a_channel;
  int64_t channels_a_step;  // columns: an item is a multiple of so many channels (whole vectors)
};

Cut cut_of(const Problem& problem, bool aligned) {
  const Shape& shape = problem.shape;
  const int64_t item_size = size_of(problem.dtype), full = 16 / item_size;
  Cut cut{};
  if (shape.layout == Layout::channels_last || shape.S == 1) {
    cut.walk = Walk::columns;
    cut.rows = shape.N * shape.S, cut.columns = shape.C, cut.columns_a_channel = 1;
    cut.vector = aligned && shape.C % full == 0 ? full : 1;
    cut.channels_a_step = cut.vector;
    return cut;
  }
  cut.rows = shape.N, cut.columns = shape.C * shape.S, cut.columns_a_channel = shape.S;
  // Runs of a channel below 512 bytes waste parts of what a memory page transfers (measurement 8): neighbouring
  // channels together are one run. That takes whole vectors: 2 channels of 14x14 halves, 8 of 7x7.
  constexpr int64_t shortest_run = 512;
  if (shape.S * item_size < shortest_run) {
    const int64_t vector = aligned && cut.columns % full == 0 ? full : 1;
    int64_t step = 1;
    while (step * shape.S % vector != 0) step *= 2;
    if (step * shape.S / vector <= most_lanes) {
      cut.walk = Walk::columns, cut.vector = vector, cut.channels_a_step = step;
      return cut;
    }
  }
  cut.walk = Walk::rows;
  cut.vector = aligned ? full : 1;
  cut.channels_a_step = 1;
  return cut;
}

void set_item(Plan& plan, const Cut& cut, const Shape& shape, int64_t channels) {
  plan.walk = cut.walk;
  plan.vector = cut.vector;
  plan.threads = threads_a_block;
  plan.rows = cut.rows, plan.columns = cut.columns, plan.columns_a_channel = cut.columns_a_channel;
  plan.channels_an_item = smaller(channels, shape.C);
  plan.items = ceil_div(shape.C, plan.channels_an_item);
  if (cut.walk == Walk::rows) {
    // A row that begins within a vector may touch one more than its length says.
    const bool whole = shape.S % cut.vector == 0;
    plan.vectors_a_row = whole ? shape.S / cut.vector : (shape.S + 2 * cut.vector - 2) / cut.vector;
    plan.lanes_a_row = 0;
  } else {
    plan.vectors_a_row = ceil_div(plan.channels_an_item * cut.columns_a_channel, cut.vector);
    plan.lanes_a_row = at_least(plan.vectors_a_row);
  }
}

// Sums of columns or of warps, three doubles and four coefficients a channel; see Scratch in reduce.cuh.
int64_t scratch_bytes(const Plan& plan, DType dtype) {
  const int64_t sums = plan.walk == Walk::rows ? warps : plan.lanes_a_row * plan.vector;
  const int64_t coefficient = dtype == DType::f64 ? 8 : 4;
  return round_up(2 * sums * 8 + plan.channels_an_item * (3 * 8 + 4 * coefficient), 128);
}

// Shared memory that one tensor's share of an item takes, with `blocks` blocks an item.
int64_t slice_bytes(const Plan& plan, int64_t blocks) {
  if (plan.walk == Walk::rows) {
    const int64_t vectors = ceil_div(plan.rows * plan.vectors_a_row, blocks);
    return round_up(vectors, threads_a_block) * 16;
  }
  const int64_t rows_a_step = threads_a_block / plan.lanes_a_row;
  return round_up(ceil_div(plan.rows, blocks), rows_a_step) * plan.vectors_a_row * 16;
}

// Channels of an item at least `vectors` wide: whole steps, and no more than threads and sums have room for.
int64_t width_in_channels(const Cut& cut, const Shape& shape, int64_t vectors) {
  const int64_t a_step = cut.channels_a_step * cut.columns_a_channel / cut.vector;  // vectors
  const int64_t channels = cut.channels_a_step * larger<int64_t>(1, smaller(vectors, most_lanes) / a_step);
  const int64_t all = round_up(shape.C, cut.channels_a_step);
  return smaller(smaller(channels, all), threads_a_block / cut.channels_a_step * cut.channels_a_step);
}

Plan streaming(const Problem& problem, const Cut& cut, Pass pass, bool training, const Device& device) {
  Plan plan{};
  plan.strategy = Strategy::streaming;
  plan.multiprocessors = device.multiprocessors;
  // Rows of 512 bytes, a warp's worth of vectors.
  set_item(plan, cut, problem.shape, cut.walk == Walk::rows ? 1 : width_in_channels(cut, problem.shape, 32));
  // Two blocks of the reductions' registers fit a multiprocessor; twice as many even out their ends.
  constexpr int64_t blocks_a_multiprocessor = 4;
  // Fewer vectors a thread than this, and starting a block costs more than its work.
  constexpr int64_t fewest_steps = 4;
  const int64_t steps = plan.walk == Walk::rows ? ceil_div(plan.rows * plan.vectors_a_row, threads_a_block)
                                                : ceil_div(plan.rows, threads_a_block / plan.lanes_a_row);
  const int64_t wanted = ceil_div(blocks_a_multiprocessor * device.multiprocessors, plan.items);
  // Beyond so many items the machine is full without sharing them, and counters are not enough for all.
  constexpr int64_t most_shared = counter_bytes / 2 / 4;
  plan.blocks_an_item = plan.items > most_shared ? 1 : larger<int64_t>(1, smaller(wanted, steps / fewest_steps));
  plan.groups = plan.items, plan.waves = 1;
  plan.blocks = plan.items * plan.blocks_an_item;
  plan.scratch_bytes = plan.shared_bytes = scratch_bytes(plan, problem.dtype);
  const bool backward = pass == Pass::backward;
  const int64_t packet = backward ? 16 : 24;
  const int64_t packets = plan.blocks_an_item > 1 ? plan.blocks * plan.channels_an_item * packet : 0;
  const int64_t sums = backward && training ? problem.shape.C * 16 : 0;
  plan.workspace_bytes = round_up(packets, 256) + sums;
  const int64_t tensor = problem.shape.elements() * size_of(problem.dtype);
  plan.least_bytes = (backward ? 3 : 2) * tensor;
  plan.bytes = !training ? plan.least_bytes : (backward ? 5 : 3) * tensor;
  return plan;
}

// How many of the waves' places are taken: 1 where every group has an item in every wave.
double evenness(const Plan& plan) { return double(plan.items) / double(plan.waves * plan.groups); }

// With `layers` blocks on each multiprocessor and items of `channels`; blocks == 0 where an item does not fit.
Plan resident(const Problem& problem, const Cut& cut, Pass pass, const Device& device, int64_t channels,
              int64_t layers) {
  Plan plan{};
  plan.strategy = Strategy::resident;
  plan.multiprocessors = device.multiprocessors;
  set_item(plan, cut, problem.shape, channels);
  plan.scratch_bytes = scratch_bytes(plan, problem.dtype);
  const int64_t tensors = pass == Pass::backward ? 2 : 1;
  const int64_t room =
      smaller(device.shared_per_multiprocessor / layers - device.shared_reserved, device.shared_per_block) / 128 * 128 -
      plan.scratch_bytes;
  const auto fits = [&](int64_t blocks) { return tensors * slice_bytes(plan, blocks) <= room; };
  const int64_t resident_blocks = layers * device.multiprocessors;
  const int64_t most = device.cooperative ? resident_blocks : 1;
  // The fewest blocks that hold an item.
  const int64_t bytes = tensors * slice_bytes(plan, 1);
  int64_t fewest = larger<int64_t>(1, bytes / larger<int64_t>(room, 1));
  while (fewest <= most && !fits(fewest)) ++fewest;
  if (room <= 0 || fewest > most) return plan;

  // Barrier counters lie in counter_bytes.
  constexpr int64_t most_groups = counter_bytes / 2 / barrier_bytes;
  // Slices below this, and the barrier takes longer than the transfer (measurement 3).
  constexpr int64_t least_slice = 16 * kilobyte;
  const auto set_groups = [&](int64_t waves) {
    plan.waves = waves;
    plan.groups = ceil_div(plan.items, waves);
    plan.blocks_an_item = larger(fewest, smaller(resident_blocks / plan.groups, bytes / least_slice));
    if (!device.cooperative) plan.blocks_an_item = 1;
  };
  const int64_t at_once = smaller(larger<int64_t>(1, resident_blocks / fewest), most_groups);
  set_groups(ceil_div(plan.items, at_once));
  // Few waves and the last one ragged: one more of them, in wider groups.
  if (evenness(plan) < 0.9 && plan.waves < 4 && plan.waves < plan.items) {
    const Plan ragged = plan;
    set_groups(plan.waves + 1);
    if (evenness(plan) <= evenness(ragged)) plan = ragged;
  }
  plan.blocks = plan.groups * plan.blocks_an_item;
  plan.cooperative = plan.blocks_an_item > 1;
  plan.slice_bytes = slice_bytes(plan, plan.blocks_an_item);
  plan.shared_bytes = plan.scratch_bytes + tensors * plan.slice_bytes;
  plan.workspace_bytes =
      plan.cooperative ? 2 * plan.blocks * plan.channels_an_item * (pass == Pass::backward ? 16 : 24) : 0;
  // A layer starts when the one before it has its slice: no sooner would memory be faster (measurement 4).
  if (device.bytes_per_microsecond > 0 && plan.blocks > device.multiprocessors) {
    plan.stagger = tensors * plan.slice_bytes * device.multiprocessors * 1000 / device.bytes_per_microsecond;
  }
  const int64_t tensor = problem.shape.elements() * size_of(problem.dtype);
  plan.bytes = plan.least_bytes = (tensors + 1) * tensor;
  return plan;
}

}  // namespace

int64_t mask_bytes(const Problem& problem) {
  const Cut cut = cut_of(problem, true);
  if (cut.vector == 1 || problem.dtype == DType::f64) return 0;
  Plan plan{};
  set_item(plan, cut, problem.shape, cut.channels_a_step);
  return cut.walk == Walk::rows ? plan.items * plan.rows * plan.vectors_a_row : plan.rows * plan.columns / plan.vector;
}

Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device) {
  const Cut cut = cut_of(problem, aligned);
  const Plan fallback = streaming(problem, cut, pass, training, device);
  const int64_t full = 16 / size_of(problem.dtype);
  if (!training || cut.vector != full) return fallback;

  // Widths of an item, from the narrowest that memory serves at full speed (64 bytes of each row, measurement 8).
  const int64_t narrowest = cut.walk == Walk::rows ? 1 : width_in_channels(cut, problem.shape, 4);
  const int64_t enough =
      device.multiprocessors / 2;  // multiprocessors at work that saturate the memory (measurement 1)
  Plan best{};
  // Four blocks a multiprocessor overlap best (measurement 4); one is better than reading twice.
  for (const int64_t layers : {4, 2, 1}) {
    const Plan plan = resident(problem, cut, pass, device, narrowest, layers);
    if (plan.blocks == 0) continue;
    if (best.blocks == 0) best = plan;
    // Without a barrier, where one block holds an item and there are items for the whole machine.
    const bool full_wave = plan.items <= device.multiprocessors && plan.items * 4 >= device.multiprocessors * 3;
    if (best.cooperative && plan.blocks_an_item == 1 && (layers > 1 ? plan.items >= enough : full_wave)) best = plan;
  }
  if (best.blocks == 0) return fallback;
  // Twice as wide, where there are still two waves of them or no barrier to wait at: longer runs.
  if (best.walk == Walk::columns) {
    const int64_t wider = width_in_channels(cut, problem.shape, 2 * best.vectors_a_row);
    if (wider > narrowest) {
      const int64_t layers =
          larger<int64_t>(1, device.shared_per_multiprocessor / (best.shared_bytes + device.shared_reserved));
      const Plan plan = resident(problem, cut, pass, device, wider, layers >= 4 ? 4 : layers >= 2 ? 2 : 1);
      const bool busy = plan.blocks >= best.blocks || plan.groups >= enough;
      if (plan.blocks != 0 && busy && (plan.waves >= 2 || !plan.cooperative) && plan.cooperative <= best.cooperative) {
        best = plan;
      }
    }
  }
  return best;
}

}  // namespace fastbn::cuda
