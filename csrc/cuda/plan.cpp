// The planner, with the reason beside each constant. No GPU has measured them yet: they are assumed, from a simulation
// of an H200, and name the measurement of benchmarks/probe.cu that decides.
#include "plan.h"

#include <initializer_list>

namespace fastbn::cuda {

namespace {

constexpr int64_t kilobyte = 1 << 10;
constexpr int64_t most_lanes = 128;
constexpr int64_t record_bytes = 16;  // a partial result of a channel: two doubles

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
  // Rows shorter than 512 bytes waste DRAM bandwidth (measurement 8), and rows that end within a sector of 32 bytes
  // read it twice, so several channels form one row, in whole vectors and whole sectors: 4 channels of 14x14 halves, 16
  // of 7x7.
  constexpr int64_t shortest_run = 512, sector = 32;
  const int64_t run = shape.S * element_size;
  if (run < shortest_run || (run % sector != 0 && run < 50 * sector)) {
    const int64_t vector = aligned && cut.columns % full == 0 ? full : 1;
    const auto whole = [&](int64_t channels, int64_t bytes) { return channels * run % bytes == 0; };
    int64_t step = 1;
    while (!whole(step, vector * element_size)) step *= 2;
    if (vector > 1 && !whole(step, sector) && 2 * step * shape.S / vector <= most_lanes && 2 * step <= shape.C)
      step *= 2;
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

void set_channel_tile(Plan& plan, const Cut& cut, const Shape& shape, int64_t channels, int64_t threads) {
  plan.pattern = cut.pattern;
  plan.vector = cut.vector;
  plan.threads = threads;
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
    plan.lanes_per_row = spans_vectors(plan) ? plan.vectors_per_row : at_least(plan.vectors_per_row);
  }
}

// Sums of warps, threads or columns, and per channel a record, three doubles and four coefficients; see Scratch in
// reduce.cuh.
int64_t scratch_bytes(const Plan& plan, DType dtype) {
  const int64_t coefficient = dtype == DType::f64 ? 8 : 4;
  return round_up(larger(sums_bytes(plan, dtype), plan.staging_bytes) +
                      plan.channels_per_tile * (2 * record_bytes + 3 * 8 + 4 * coefficient),
                  128);
}

// Shared memory for one tensor's part of a channel tile that is split over `blocks` blocks.
int64_t slice_bytes(const Plan& plan, int64_t blocks) {
  if (plan.pattern == AccessPattern::rows) {
    const int64_t vectors = ceil_div(plan.rows * plan.vectors_per_row, blocks);
    return round_up(vectors, plan.threads) * 16;
  }
  const int64_t rows_per_step = plan.threads / plan.lanes_per_row;
  return round_up(ceil_div(plan.rows, blocks), rows_per_step) * plan.vectors_per_row * 16;
}

// Channels of a channel tile at least `vectors` wide: whole steps, within what threads and sums have room for.
int64_t width_in_channels(const Cut& cut, const Shape& shape, int64_t vectors, int64_t threads) {
  const int64_t step_width = cut.channels_per_step * cut.columns_per_channel / cut.vector;  // vectors
  const int64_t channels = cut.channels_per_step * larger<int64_t>(1, smaller(vectors, most_lanes) / step_width);
  const int64_t all = round_up(shape.C, cut.channels_per_step);
  return smaller(smaller(channels, all), threads / cut.channels_per_step * cut.channels_per_step);
}

// One byte per vector.
int64_t mask_bytes(const Problem& problem, const Cut& cut) {
  if (cut.vector == 1 || problem.dtype == DType::f64) return 0;
  Plan plan{};
  set_channel_tile(plan, cut, problem.shape, cut.channels_per_step, resident_threads);
  return cut.pattern == AccessPattern::rows ? plan.channel_tiles * plan.rows * plan.vectors_per_row
                                            : plan.rows * plan.columns / plan.vector;
}

// How the blocks of a channel tile are merged. At once, every block reads the records of all others, which is one round
// trip; in subgroups of about the square root, the last block of each merges it first, which is three more.
void set_merge(Plan& plan, const Device& device, int64_t fewest) {
  const int64_t blocks = plan.batch_splits;
  plan.subgroup = plan.cluster = 1;
  if (blocks >= fewest && blocks * plan.channels_per_tile > device.merged_at_once) {
    while (plan.subgroup * plan.subgroup < blocks) ++plan.subgroup;
  }
}
int64_t subgroups(const Plan& plan) { return ceil_div(plan.batch_splits, plan.subgroup); }
// Of the records of a channel tile, as merge.cuh lays them out.
int64_t merge_bytes(const Plan& plan) {
  const int64_t parts = subgroups(plan);
  if (plan.cluster > 1) return parts > 1 ? parts * plan.channels_per_tile * record_bytes : 0;
  const int64_t of_blocks = plan.subgroup > 1 ? parts * plan.subgroup : 0;
  return (parts + of_blocks) * plan.channels_per_tile * record_bytes;
}

// Whether what the blocks move besides the tensors is at most 2 % of the tensors' bytes, or 256 KB: the records that
// they read of each other at once, each written to a sector of its own, and in each block the parameters (and moments).
// A tenth is left for what starts within a sector.
bool merges_little(const Plan& plan, const Problem& problem, Pass pass) {
  if (plan.batch_splits == 1) return true;
  // Of a cluster, each block reads the records of a part of the channels.
  const int64_t parts = plan.cluster > 1 ? subgroups(plan) : plan.batch_splits;
  const int64_t tensors = pass == Pass::backward ? 3 : 2, parameters = pass == Pass::backward ? 20 : 8;
  const int64_t records = parts > 1 ? parts * (parts * record_bytes + 32) : 0;
  const int64_t bytes = problem.shape.C * (records + plan.batch_splits * parameters);
  return bytes <= larger(tensors * problem.shape.elements() * size_of(problem.dtype) / 56, 256 * kilobyte);
}

Plan streaming(const Problem& problem, const Cut& cut, Pass pass, bool training, const Device& device) {
  Plan plan{};
  plan.strategy = Strategy::streaming;
  plan.multiprocessors = device.multiprocessors;
  // Rows of 512 bytes, one vector per lane of a warp.
  set_channel_tile(
      plan, cut, problem.shape,
      cut.pattern == AccessPattern::rows ? 1 : width_in_channels(cut, problem.shape, 32, streaming_threads),
      streaming_threads);
  // Two blocks of a reduction fit on a multiprocessor by registers; twice as many even out the tail.
  constexpr int64_t blocks_per_multiprocessor = 4;
  // With fewer vectors per thread, starting a block costs more than its work.
  constexpr int64_t fewest_steps = 4;
  const int64_t steps = plan.pattern == AccessPattern::rows
                            ? ceil_div(plan.rows * plan.vectors_per_row, streaming_threads)
                            : ceil_div(plan.rows, streaming_threads / plan.lanes_per_row);
  const int64_t wanted = ceil_div(blocks_per_multiprocessor * device.multiprocessors, plan.channel_tiles);
  // With more channel tiles the GPU is full without splitting them, and there are not enough counters for all.
  constexpr int64_t most_shared = counter_bytes / 2 / barrier_bytes / 2;
  plan.batch_splits = plan.channel_tiles > most_shared ? 1 : larger<int64_t>(1, smaller(wanted, steps / fewest_steps));
  set_merge(plan, device, 8);
  if (plan.channel_tiles * (1 + subgroups(plan)) > 2 * most_shared) plan.subgroup = 1;
  if (plan.batch_splits > 1) plan.tickets = plan.channel_tiles * (plan.subgroup > 1 ? 1 + subgroups(plan) : 1);
  plan.groups = plan.channel_tiles, plan.waves = 1;
  plan.blocks = plan.channel_tiles * plan.batch_splits;
  plan.staging_bytes = 8 * kilobyte;
  plan.scratch_bytes = plan.shared_bytes = scratch_bytes(plan, problem.dtype);
  const bool backward = pass == Pass::backward;
  const int64_t partials = plan.batch_splits > 1 ? plan.channel_tiles * merge_bytes(plan) : 0;
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
// staging: bytes for the records of other blocks; 0: for those of 32 blocks of a channel, or of 16 of several channels.
Plan resident(const Problem& problem, const Cut& cut, Pass pass, const Device& device, int64_t channels, int64_t layers,
              int64_t staging = 0) {
  Plan plan{};
  plan.strategy = Strategy::resident;
  plan.cluster = plan.subgroup = 1;
  plan.multiprocessors = device.multiprocessors;
  set_channel_tile(plan, cut, problem.shape, channels, resident_threads);
  const bool rows = plan.pattern == AccessPattern::rows;
  plan.staging_bytes = staging != 0 ? staging : rows ? 32 * record_bytes : 8 * kilobyte;
  plan.scratch_bytes = scratch_bytes(plan, problem.dtype);
  const int64_t tensors = pass == Pass::backward ? 2 : 1;
  const int64_t room =
      smaller(device.shared_per_multiprocessor / layers - device.shared_reserved, device.shared_per_block) / 128 * 128 -
      plan.scratch_bytes;
  const auto fits = [&](int64_t blocks) { return tensors * slice_bytes(plan, blocks) <= room; };
  // A cluster is within a processing cluster of 16 or 18 multiprocessors of the GPU, where its blocks have to fit.
  const int64_t in_clusters = device.multiprocessors / 16 * 16;
  const bool clusters = device.cluster > 1 && device.cooperative && plan.pattern == AccessPattern::columns;
  const int64_t resident_blocks = layers * (clusters && in_clusters > 0 ? in_clusters : device.multiprocessors);
  const int64_t most = device.cooperative ? resident_blocks : 1;
  // The fewest blocks that hold a channel tile.
  const int64_t bytes = tensors * slice_bytes(plan, 1);
  int64_t fewest = larger<int64_t>(1, bytes / larger<int64_t>(room, 1));
  while (fewest <= most && !fits(fewest)) ++fewest;
  if (clusters && fewest > 1) fewest = fewest < device.cluster ? at_least(fewest) : round_up(fewest, device.cluster);
  if (room <= 0 || fewest > most) return plan;

  constexpr int64_t most_groups = counter_bytes / 2 / barrier_bytes;
  // With smaller slices the barrier takes longer than the transfer (measurement 3).
  constexpr int64_t least_slice = 32 * kilobyte;
  const auto set_groups = [&](int64_t waves) {
    plan.waves = waves;
    plan.groups = ceil_div(plan.channel_tiles, waves);
    plan.batch_splits = larger(fewest, smaller(resident_blocks / plan.groups, bytes / least_slice));
    if (!device.cooperative) plan.batch_splits = 1;
    if (clusters) {  // whole clusters, or one of a power of two
      if (plan.batch_splits >= device.cluster) {
        plan.batch_splits -= plan.batch_splits % device.cluster;
      } else {
        plan.batch_splits = at_least(plan.batch_splits + 1) / 2;
      }
      plan.cluster = plan.subgroup = smaller(plan.batch_splits, device.cluster);
      return;
    }
    // Fewer blocks, where more cost too much merging: in one wave half of the multiprocessors saturate memory
    // (measurement 1), in several waves the others wait for their tiles.
    Plan few = plan;
    const int64_t least_busy = waves == 1 ? device.multiprocessors * 2 / 5 : device.multiprocessors * 3 / 4;
    while (few.batch_splits > fewest && few.batch_splits > 1 && !merges_little(few, problem, pass) &&
           (few.batch_splits - 1) * few.groups >= least_busy) {
      --few.batch_splits;
    }
    if (merges_little(few, problem, pass)) plan.batch_splits = few.batch_splits;
  };
  const int64_t at_once = smaller(larger<int64_t>(1, resident_blocks / fewest), most_groups);
  set_groups(ceil_div(plan.channel_tiles, at_once));
  // Few waves with a ragged last one: one more wave, with wider groups.
  if (evenness(plan) < 0.9 && plan.waves < 4 && plan.waves < plan.channel_tiles) {
    const Plan ragged = plan;
    set_groups(plan.waves + 1);
    if (evenness(plan) <= evenness(ragged)) plan = ragged;
  }
  if (rows && staging == 0 && plan.batch_splits * record_bytes > plan.staging_bytes) {
    return resident(problem, cut, pass, device, channels, layers, 4 * kilobyte);
  }
  plan.blocks = plan.groups * plan.batch_splits;
  plan.cooperative = plan.batch_splits > 1;
  if (!clusters) set_merge(plan, device, 8);
  if (plan.cooperative) {
    plan.barriers = plan.cluster == 1 || subgroups(plan) > 1 ? plan.groups : 0;
    plan.tickets = plan.cluster == 1 && plan.subgroup > 1 ? plan.groups * subgroups(plan) : 0;
  }
  plan.slice_bytes = slice_bytes(plan, plan.batch_splits);
  plan.shared_bytes = plan.scratch_bytes + tensors * plan.slice_bytes;
  plan.workspace_bytes = plan.cooperative ? 2 * plan.groups * merge_bytes(plan) : 0;  // two sets
  // A layer starts when the previous one has loaded its slice; memory would not be faster sooner (measurement 4).
  if (device.bytes_per_microsecond > 0 && plan.blocks > device.multiprocessors) {
    plan.stagger = tensors * plan.slice_bytes * device.multiprocessors * 1000 / device.bytes_per_microsecond;
  }
  plan.bytes = plan.least_bytes = (tensors + 1) * problem.shape.elements() * size_of(problem.dtype);
  return plan;
}

Plan choose(const Problem& problem, const Cut& cut, Pass pass, bool training, const Device& device) {
  const Plan fallback = streaming(problem, cut, pass, training, device);
  const int64_t full = 16 / size_of(problem.dtype);
  if (!training || cut.vector != full) return fallback;

  // Starts with the narrowest channel tile that memory serves at full speed (64 bytes of each row, measurement 8).
  const int64_t narrowest =
      cut.pattern == AccessPattern::rows ? 1 : width_in_channels(cut, problem.shape, 4, resident_threads);
  const int64_t enough = device.multiprocessors / 2;  // multiprocessors that saturate memory (measurement 1)
  Plan best{};
  // Two blocks per multiprocessor overlap as well as four of half the size (measurement 4); one is still better than
  // reading twice.
  for (const int64_t layers : {2, 1}) {
    const Plan plan = resident(problem, cut, pass, device, narrowest, layers);
    if (plan.blocks == 0) continue;
    if (best.blocks == 0) best = plan;
    // Prefer a plan without barriers if one block holds a channel tile and there are enough tiles for the whole GPU.
    const bool full_wave =
        plan.channel_tiles <= device.multiprocessors && plan.channel_tiles * 4 >= device.multiprocessors * 3;
    if (best.cooperative && plan.batch_splits == 1 && (layers > 1 ? plan.channel_tiles >= enough : full_wave))
      best = plan;
    // Fewer blocks with larger slices merge less. In a single wave, or with a single group, nothing overlaps with the
    // barrier anyway; otherwise there have to be as many groups that do.
    const bool overlaps = plan.waves == 1 || plan.groups >= best.groups;
    if (overlaps && merges_little(plan, problem, pass) && !merges_little(best, problem, pass)) best = plan;
  }
  if (best.blocks == 0) return fallback;
  // Twice as wide, if there are still two waves or no barrier to wait at: longer rows.
  if (best.pattern == AccessPattern::columns) {
    const int64_t wider = width_in_channels(cut, problem.shape, 2 * best.vectors_per_row, resident_threads);
    if (wider > narrowest) {
      const int64_t layers =
          larger<int64_t>(1, device.shared_per_multiprocessor / (best.shared_bytes + device.shared_reserved));
      const Plan plan = resident(problem, cut, pass, device, wider, layers >= 2 ? 2 : 1);
      const bool busy = plan.blocks >= best.blocks || plan.groups >= enough;
      if (!merges_little(plan, problem, pass) && merges_little(best, problem, pass)) return best;
      if (plan.blocks != 0 && busy && (plan.waves >= 2 || !plan.cooperative) && plan.cooperative <= best.cooperative) {
        best = plan;
      }
    }
  }
  return best;
}

}  // namespace

int64_t sums_bytes(const Plan& plan, DType dtype) {
  const int64_t size = size_of(dtype) == 2 ? 4 : 8, warps = plan.threads / 32;
  if (plan.pattern == AccessPattern::rows) return 2 * warps * 8;
  if (spans_vectors(plan)) return 4 * plan.threads * size;
  const int64_t shares = plan.lanes_per_row <= 32 ? warps : plan.threads / plan.lanes_per_row;
  return round_up(shares * (2 * plan.lanes_per_row * plan.vector + 1) * size, 16);
}

Plan make_plan(const Problem& problem, Pass pass, bool training, bool aligned, const Device& device) {
  const Cut cut = cut_of(problem, aligned);
  Plan plan = choose(problem, cut, pass, training, device);
  plan.mask_bytes = mask_bytes(problem, cut);
  return plan;
}

}  // namespace fastbn::cuda
