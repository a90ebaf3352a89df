// What a launch of translated PTX would cost on a GPU: counted while it is executed, thread by thread, and put together
// for warps. Lanes are joined by program counter and occurrence, that is, by the instruction and the iteration of every
// loop around it, as if lanes that took different ways met again as soon as they can.
#pragma once

#include <array>
#include <cstdio>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "entry.h"
#include "machine.h"

namespace ptx {

// ---- what is counted -----------------------------------------------------------------------------------------------

// Accesses of one instruction. Sectors are pieces of 32 bytes of global memory, cycles those of shared memory.
struct Accesses {
  uint64_t requests = 0, lanes = 0, sectors = 0, least_sectors = 0, cycles = 0, least_cycles = 0;
  std::map<std::string, uint64_t> sectors_of;  // by region
};

// Between two barriers of a block: instructions of the warp that executes most of them, and of all warps.
struct Phases {
  uint64_t count = 0, longest = 0, all = 0;
};

struct Counts {
  const Entry* entry = nullptr;
  uint64_t blocks = 0, threads = 0, warps = 0, block_barriers = 0, group_barriers = 0;
  std::vector<uint64_t> executions, lanes;  // of basic blocks, by warps; lanes that were active in them
  std::vector<Accesses> sites;
  std::map<int, Phases> phases;  // by the site of the barrier at their end, or -1
  // The longest chain of accesses to global memory that wait for each other: of the launch, and between the arrival of
  // a tensor's data and the thread's next store to a tensor.
  uint32_t round_trips = 0, tile_round_trips = 0;
};

// Memory that the program named: tensors have names, everything else is "other".
struct Region {
  std::string name;
  uint64_t begin;
  size_t bytes;
};
inline std::vector<Region> regions;
inline const char* region_of(uint64_t address) {
  for (const Region& r : regions) {
    if (address - r.begin < r.bytes) return r.name.c_str();
  }
  return "other";
}
inline bool in_tensor(uint64_t address) {
  for (const Region& r : regions) {
    if (address - r.begin < r.bytes) return true;
  }
  return false;
}

inline uint64_t mixed(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15;
  return h ^ h >> 29;
}

struct WarpCounts {
  struct Access {
    int site;
    unsigned mask = 0;
    uint64_t address[32];
  };
  std::unordered_map<uint64_t, std::pair<int, unsigned>> blocks;  // which one, lanes
  std::unordered_map<uint64_t, Access> accesses;
  unsigned exited = 0;
  uint32_t latest[2]{};          // clocks of shuffles
  std::vector<uint64_t> phases;  // instructions between barriers
};

// What the blocks of a launch have in common while they are counted.
struct Counting {
  // A value of a counter, and when it was written; the first is what it was before. A thread that polls meets all of
  // them in turn, so that the time it waits does not depend on how far the machine let others go ahead.
  struct Written {
    uint32_t value, when;
  };
  Counts counts;
  std::unordered_map<unsigned, WarpCounts> warps{};                  // by number in the grid
  std::unordered_map<unsigned, std::array<uint32_t, 2>> barriers{};  // clocks, by block
  std::unordered_map<unsigned, std::vector<int>> barrier_sites{};    // by block, in their order
  std::unordered_map<const void*, std::array<uint32_t, 2>> cluster_clocks{};
  std::unordered_map<uint64_t, std::vector<Written>> atomics{};

  explicit Counting(const Entry& entry);
  void finish(WarpCounts& warp);  // when all of its threads have exited
  void finish_phases();
  void print(FILE* to) const;  // one line of JSON
};

}  // namespace ptx
