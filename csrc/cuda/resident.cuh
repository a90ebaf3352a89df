// In: a share of an item in global memory. Out: the same in shared memory, copied asynchronously and met again piece by
// piece, while the rest is still on its way. Each thread meets what it copied itself, so that nobody waits for others.
#pragma once

#include "tile.cuh"

namespace fastbn::cuda {

// Copies are waited for in so many parts, each of which is reduced while the later ones arrive.
constexpr int stages = 4;

// What one thread copies of one tensor lies at its own places in the slice.
template <class T, class Walk>
struct Slice {
  unsigned char* data;

  FASTBN_D unsigned char* at(const Walk& walk, int step) const {
    return data + (step * walk.places() + walk.place()) * 16;
  }
  FASTBN_D void fetch(const T* x, const Walk& walk, const Piece& p, int step) const {
    constexpr int V = full_vector<T>;
    if (p.first == 0 && p.last == V) {
      copy16(at(walk, step), x + p.offset);
    } else if (p.first < p.last) {
      shared_store16(at(walk, step), load_piece<T, V>(x, p, true));
    }
  }
};

// fetch(piece, step) for each of the thread's pieces, committed in `stages` parts.
template <class Walk, class Fetch>
FASTBN_D void fetch_all(Walk& walk, const Fetch& fetch) {
  const int a_stage = int(ceil_div(walk.steps(), stages));
  walk.start();
  int step = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
#pragma unroll 1
    for (int end = step + a_stage; step < end && walk.more(); ++step, walk.next()) fetch(walk.piece(), step);
    copies_commit();
  }
}

FASTBN_D void wait_for_stage(int stage) {
  if (stage == 0) copies_done<3>();
  if (stage == 1) copies_done<2>();
  if (stage == 2) copies_done<1>();
  if (stage == 3) copies_done<0>();
}

// meet(piece, step) for each of the thread's pieces as they arrive, and after each part of them flush().
template <class Walk, class Meet, class Flush>
FASTBN_D void meet_all(Walk& walk, const Meet& meet, const Flush& flush) {
  const int a_stage = int(ceil_div(walk.steps(), stages));
  walk.start();
  const int all = walk.steps_left();
  int step = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_stage(stage);
    const int end = smaller(step + a_stage, all);
#pragma unroll 1
    for (; step < end; ++step, walk.next()) meet(walk.piece(), step);
    flush();
  }
}

// The bytes of a mask for the thread's next pieces, four of them in a register and asked for together: while slices are
// met, each load that a thread waits for by itself would cost as much as everything else.
template <class Walk>
struct MasksAhead {
  const uint8_t* mask;
  unsigned bytes = 0;

  FASTBN_D void fetch(Walk walk) {
    bytes = 0;
    walk.find_offset();
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (!walk.more()) continue;
      const Piece p = walk.piece();
      if (p.first < p.last) bytes |= unsigned(load(mask + p.index)) << (8 * u);
      walk.next();
    }
  }
  // Of the piece that the walk is at, in its turn; those of the first steps were fetched before.
  FASTBN_D unsigned at(const Walk& walk, int step) {
    if (step > 0 && step % 4 == 0) fetch(walk);
    return bytes >> (step % 4 * 8);
  }
};

// The blocks of one multiprocessor start one after the other, so that they are not all between their last load and
// their first store at the same time, when a block transfers nothing.
FASTBN_D void stagger(const Geometry& g) {
  const int64_t layer = blockIdx.x / g.multiprocessors;
  if (g.stagger > 0 && layer > 0) sleep_nanoseconds(layer * g.stagger);
}

}  // namespace fastbn::cuda
