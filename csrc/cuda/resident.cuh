// Asynchronous copies of a tile to shared memory, consumed span by span while the rest is still in flight. Each thread
// reads only what it copied itself, so no barrier is needed.
#pragma once

#include "access.cuh"

namespace fastbn::cuda {

// Copies are committed in this many groups, each of which is reduced while the later ones are in flight.
constexpr int stages = 4;

// The part of a slice that one thread copies and reads.
template <class T>
struct Slice {
  unsigned char* data;  // of the thread's first vector
  int step_bytes;

  template <class Access>
  FASTBN_D Slice(unsigned char* slice, const Access& access)
      : data(slice + access.place() * 16), step_bytes(access.places() * 16) {}

  FASTBN_D unsigned char* at(int step) const { return data + step * step_bytes; }
  FASTBN_D void fetch(const T* x, const VectorSpan& p, int step) const {
    constexpr int V = full_vector<T>;
    if (p.first == 0 && p.last == V) {
      copy16(at(step), x + p.offset);
    } else if (p.first < p.last) {
      shared_store16(at(step), load_span<T, V>(x, p, true));
    }
  }
};

// Calls fetch(span, step) for each span of the thread and commits them in `stages` groups.
template <class Access, class Fetch>
FASTBN_D void fetch_all(Access& access, const Fetch& fetch) {
  const int steps_per_stage = (access.steps + stages - 1) / stages;
  access.start();
  int step = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const int end = smaller(step + steps_per_stage, access.steps);
#pragma unroll 1
    for (; step < end; ++step, access.next()) fetch(access.span(), step);
    copies_commit();
  }
}

FASTBN_D void wait_for_stage(int stage) {
  if (stage == 0) copies_done<3>();
  if (stage == 1) copies_done<2>();
  if (stage == 2) copies_done<1>();
  if (stage == 3) copies_done<0>();
}

// Calls consume(span, step) for each span of the thread as it arrives, and flush() after each group.
template <class Access, class Consume, class Flush>
FASTBN_D void consume_all(Access& access, const Consume& consume, const Flush& flush) {
  const int steps_per_stage = (access.steps + stages - 1) / stages;
  access.start();
  int step = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_stage(stage);
    const int end = smaller(step + steps_per_stage, access.steps);
#pragma unroll 1
    for (; step < end; ++step, access.next()) consume(access.span(), step);
    flush();
  }
}

// Prefetches the mask bytes of the next four spans into a register: waiting for single loads would cost as much as
// everything else.
template <class Access>
struct MaskPrefetch {
  const uint8_t* mask;
  unsigned bytes = 0;

  FASTBN_D void fetch(Access access) {
    bytes = 0;
    access.find_offset();
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (!access.more()) continue;
      const VectorSpan p = access.span();
      if (p.first < p.last) bytes |= unsigned(load(mask + p.index)) << (8 * u);
      access.next();
    }
  }
  // The mask of the current span; the first four are fetched before.
  FASTBN_D unsigned at(const Access& access, int step) {
    if (step > 0 && step % 4 == 0) fetch(access);
    return bytes >> (step % 4 * 8);
  }
};

// Delays the blocks of one multiprocessor against each other, so that they are not all between their last load and
// first store at the same time.
FASTBN_D void stagger(const Geometry& g) {
  const int64_t layer = blockIdx.x / g.multiprocessors;
  if (g.stagger > 0 && layer > 0) sleep_nanoseconds(layer * g.stagger);
}

}  // namespace fastbn::cuda
