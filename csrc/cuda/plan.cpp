// The planner, with the reason beside each constant. No GPU has measured them yet: they are assumed, from a simulation
// of an H200, and name the measurement of benchmarks/probe.cu that decides.
#include "plan.h"

#include <initializer_list>

namespace fastbn::cuda {

namespace {

constexpr int64_t kilobyte = 1 << 10;
constexpr int64_t warps = threads_per_block / 32;
constexpr int64_t most_lanes = 128;  // 1024 columns of sums in double are 16 KB of shared memory

int64_t at_least(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// The part of a plan that does not depend on the GPU.
struct Cut {
  AccessPattern pattern;
  int64_t vector, rows, columns, columns_per_channel;
  int64_t channels_per_step;  // columns: a channel tile is a multiple of so many channels (whole vectors)
};

Cut cut_of(const Problem& problem, bool aligned) {
  const Shape& shape = problem.shape;
  const int64_t element_size = size_of(problem.dtype), full = 16 / element_size;
  Cut cut{};
  if (shape.layout == Layout::channels_last || shape.S == 1) {
    cut.pattern = AccessPattern::columns;
    cut.rows = shape.N * shape.S, cut.columns = shape.C, cut.columns_per_channel = 1;
    cut.vector = aligned && shape.C % full == 0 ? full : 1;
    cut.channels_per_step = cut.vector;
    return cut;
  }
  cut.rows = shape.N, cut.columns = shape.C * shape.S, cut.columns_per_channel = shape.S;
  // Rows shorter than 512 bytes waste DRAM bandwidth (measurement 8), so several channels form one row, in whole
  // vectors: 2 channels of 14x14 halves, 8 of 7x7.
  constexpr int64_t shortest_run = 512;
  if (shape.S * element_size < shortest_run) {
    const int64_t vector = aligned && cut.columns % full == 0 ? full : 1;
    int64_t step = 1;
    while (step * shape.S % vector != 0) step *= 2;
    if (step * shape.S / vector <= most_lanes) {
      cut.pattern = AccessPattern::columns, cut.vector = vector, cut.channels_per_step = step;
      return cut;
    }
  }
  cut.pattern = AccessPattern::rows;
  cut.vector = aligned ? full : 1;
  cut.channels_per_step = 1;
  return cut;
}

void set_channel_tile(Plan& plan, const Cut& cut, const Shape& shape, int64_t channels) {
  plan.pattern = cut.pattern;
  plan.vector = cut.vector;
  plan.threads = threads_per_block;
  plan.rows = cut.rows, plan.columns = cut.columns, plan.columns_per_channel = cut.columns_per_channel;
  plan.channels_per_tile = smaller(channels, shape.C);
  plan.channel_tiles = ceil_div(shape.C, plan.channels_per_tile);
  if (cut.pattern == AccessPattern::rows) {
    // A row that starts within a vector may touch one vector more.
    const bool whole = shape.S % cut.vector == 0;
    plan.vectors_per_row = whole ? shape.S / cut.vector : (shape.S + 2 * cut.vector - 2) / cut.vector;
    plan.lanes_per_row = 0;
  } else {
    plan.vectors_per_row = ceil_div(plan.channels_per_tile * cut.columns_per_channel, cut.vector);
    plan.lanes_per_row = at_least(plan.vectors_per_row);
  }
}

// Sums of columns or warps, three doubles and four coefficients per channel; see Scratch in reduce.cuh.
int64_t scratch_bytes(const Plan& plan, DType dtype) {
  const int64_t sums = plan.pattern == AccessPattern::rows ? warps : plan.lanes_per_row * plan.vector;
  const int64_t coefficient = dtype == DType::f64 ? 8 : 4;
  return round_up(2 * sums * 8 + plan.channels_per_tile * (3 * 8 + 4 * coefficient), 128);
}

// Shared memory for one tensor's part of a channel tile that is split over `blocks` blocks.
int64_t slice_bytes(const Plan& plan, int64_t blocks) {
  if (plan.pattern == AccessPattern::rows) {
    const int64_t vectors = ceil_div(plan.rows * plan.vectors_per_row, blocks);
    return round_up(vectors, threads_per_block) * 16;
  }
  const int64_t rows_per_step = threads_per_block / plan.lanes_per_row;
  return round_up(ceil_div(plan.rows, blocks), rows_per_step) * plan.vectors_per_row * 16;
}

// Channels of a channel tile at least `vectors` wide: whole steps, within what threads and sums have room for.
int64_t width_in_channels(const Cut& cut, const Shape& shape, int64_t vectors) {
  const int64_t step_width = cut.channels_per_step * cut.columns_per_channel / cut.vector;  // vectors
  const int64_t channels = cut.channels_per_step * larger<int64_t>(1, smaller(vectors, most_lanes) / step_width);
  const int64_t all = round_up(shape.C, cut.channels_per_step);
  return smaller(smaller(channels, all), threads_per_block / cut.channels_per_step * cut.channels_per_step);
}

// One byte per vector.
int64_t mask_bytes(const Problem& problem, const Cut& cut) {
  if (cut.vector == 1 || problem.dtype == DType::f64) return 0;
  Plan plan{};
  set_channel_tile(plan, cut, problem.shape, cut.channels_per_step);
  return cut.pattern == AccessPattern::rows ? plan.channel_tiles * plan.rows * plan.vectors_per_row
                                            : plan.rows * plan.columns / plan.vector;
}

Plan streaming(const Problem& problem, const Cut& cut, Pass pass, bool training, const Device& device) {
  Plan plan{};
  plan.strategy = Strategy::streaming;
  plan.multiprocessors = device.multiprocessors;
  // Rows of 512 bytes, one vector per lane of a warp.
  set_channel_tile(plan, cut, problem.shape,
                   cut.pattern == AccessPattern::rows ? 1 : width_in_channels(cut, problem.shape, 32));
  // Two blocks of a reduction fit on a multiprocessor by registers; twice as many even out the tail.
  constexpr int64_t blocks_per_multiprocessor = 4;
  // With fewer vectors per thread, starting a block costs more than its work.
  constexpr int64_t fewest_steps = 4;
  const int64_t steps = plan.pattern == AccessPattern::rows
                            ? ceil_div(plan.rows * plan.vectors_per_row, threads_per_block)
                            : ceil_div(plan.rows, threads_per_block / plan.lanes_per_row);
  const int64_t wanted = ceil_div(blocks_per_multiprocessor * device.multiprocessors, plan.channel_tiles);
  // With more channel tiles the GPU is full without splitting them, and there are not enough counters for all.
  constexpr int64_t most_shared = counter_bytes / 2 / 4;
  plan.batch_splits = plan.channel_tiles > most_shared ? 1 : larger<int64_t>(1, smaller(wanted, steps / fewest_steps));
  plan.groups = plan.channel_tiles, plan.waves = 1;
  plan.blocks = plan.channel_tiles * plan.batch_splits;
  plan.scratch_bytes = plan.shared_bytes = scratch_bytes(plan, problem.dtype);
  const bool backward = pass == Pass::backward;
  const int64_t partial = backward ? 16 : 24;
  const int64_t partials = plan.batch_splits > 1 ? plan.blocks * plan.channels_per_tile * partial : 0;
  const int64_t sums = backward && training ? problem.shape.C * 16 : 0;
  plan.workspace_bytes = round_up(partials, 256) + sums;
  const int64_t tensor = problem.shape.elements() * size_of(problem.dtype);
  plan.least_bytes = (backward ? 3 : 2) * tensor;
  plan.bytes = !training ? plan.least_bytes : (backward ? 5 : 3) * tensor;
  return plan;
}

// Occupied fraction of all waves: 1 if every group has a channel tile in every wave.
double evenness(const Plan& plan) { return double(plan.channel_tiles) / double(plan.waves * plan.groups); }

// `layers` blocks on each multiprocessor and `channels` channels in a tile; blocks == 0 if a channel tile does not fit.
Plan resident(const Problem& problem, const Cut& cut, Pass pass, const Device& device, int64_t channels,
              int64_t layers) {
  Plan plan{};
  plan.strategy = Strategy::resident;
  plan.multiprocessors = device.multiprocessors;
  set_channel_tile(plan, cut, problem.shape, channels);
  plan.scratch_bytes = scratch_bytes(plan, problem.dtype);
  const int64_t tensors = pass == Pass::backward ? 2 : 1;
  const int64_t room =
      smaller(device.shared_per_multiprocessor / layers - device.shared_reserved, device.shared_per_block) / 128 * 128 -
      plan.scratch_bytes;
  const auto fits = [&](int64_t blocks) { return tensors * slice_bytes(plan, blocks) <= room; };
  const int64_t resident_blocks = layers * device.multiprocessors;
  const int64_t most = device.cooperative ? resident_blocks : 1;
  // The fewest blocks that hold a channel tile.
  const int64_t bytes = tensors * slice_bytes(plan, 1);
  int64_t fewest = larger<int64_t>(1, bytes / larger<int64_t>(room, 1));
  while (fewest <= most && !fits(fewest)) ++fewest;
  if (room <= 0 || fewest > most) return plan;

  // Barrier counters are in counter_bytes.
  constexpr int64_t most_groups = counter_bytes / 2 / barrier_bytes;
  // With smaller slices the barrier takes longer than the transfer (measurement 3).
  constexpr int64_t least_slice = 16 * kilobyte;
  const auto set_groups = [&](int64_t waves) {
    plan.waves = waves;
    plan.groups = ceil_div(plan.channel_tiles, waves);
    plan.batch_splits = larger(fewest, smaller(resident_blocks / plan.groups, bytes / least_slice));
    if (!device.cooperative) plan.batch_splits = 1;
  };
  const int64_t at_once = smaller(larger<int64_t>(1, resident_blocks / fewest), most_groups);
  set_groups(ceil_div(plan.channel_tiles, at_once));
  // Few waves with a ragged last one: one more wave, with wider groups.
  if (evenness(plan) < 0.9 && plan.waves < 4 && plan.waves < plan.channel_tiles) {
    const Plan ragged = plan;
    set_groups(plan.waves + 1);
    if (evenness(plan) <= evenness(ragged)) plan = ragged;
  }
  plan.blocks = plan.groups * plan.batch_splits;
  plan.cooperative = plan.batch_splits > 1;
  plan.slice_bytes = slice_bytes(plan, plan.batch_splits);
  plan.shared_bytes = plan.scratch_bytes + tensors * plan.slice_bytes;
  plan.workspace_bytes =
      plan.cooperative ? 2 * plan.blocks * plan.channels_per_tile * (pass == Pass::backward ? 16 : 24) : 0;
  // A layer starts when the previous one has loaded its slice; memory would not be faster sooner (measurement 4).
  if (device.bytes_per_microsecond > 0 && plan.blocks > device.multiprocessors) {
    plan.stagger = tensors * plan.slice_bytes * device.multiprocessors * 1000 / device.bytes_per_microsecond;
  }
  const int64_t tensor = problem.shape.elements() * size_of(problem.dtype);
  plan.bytes = plan.least_bytes = (tensors + 1) * tensor;
  return plan;
}

Plan choose(const Problem& problem, const Cut& cut, Pass pass, bool training, const Device& device) {
  const Plan fallback = streaming(problem, cut, pass, training, device);
  const int64_t full = 16 / size_of(problem.dtype);
  if (!training || cut.vector != full) return fallback;

  // Starts with the narrowest channel tile that memory serves at full speed (64 bytes of each row, measurement 8).
  const int64_t narrowest = cut.pattern == AccessPattern::rows ? 1 : width_in_channels(cut, problem.shape, 4);
  const int64_t enough = device.multiprocessors / 2;  // multiprocessors that saturate memory (measurement 1)
  Plan best{};
  // Four blocks per multiprocessor overlap best (measurement 4); one is still better than reading twice.
  for (const int64_t layers : {4, 2, 1}) {
    const Plan plan = resident(problem, cut, pass, device, narrowest, layers);
    if (plan.blocks == 0) continue;
    if (best.blocks == 0) best = plan;
    // Prefer a plan without barriers if one block holds a channel tile and there are enough tiles for the whole GPU.
    const bool full_wave =
        plan.channel_tiles <= device.multiprocessors && plan.channel_tiles * 4 >= device.multiprocessors * 3;
    if (best.cooperative && plan.batch_splits == 1 && (layers > 1 ? plan.channel_tiles >= enough : full_wave))
      best = plan;
  }
  if (best.blocks == 0) return fallback;
  // Twice as wide, if there are still two waves or no barrier to wait at: longer rows.
  if (best.pattern == AccessPattern::columns) {
    const int64_t wider = width_in_channels(cut, problem.shape, 2 * best.vectors_per_row);
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

}  // namespace

Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device) {
  const Cut cut = cut_of(problem, aligned);
  Plan plan = choose(problem, cut, pass, training, device);
  plan.mask_bytes = mask_bytes(problem, cut);
  return plan;
}

}  // namespace fastbn::cuda
