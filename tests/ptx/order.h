// The order of memory between the threads of a launch, as PTX promises it: what a block may know of the writes of
// others. A read of what another thread wrote before, without release and acquire in between, is an error, also where
// it got the right value; so a missing fence, a relaxed load or a missing barrier is seen, not only what it may lead
// to.
//
// Time in a block is its epoch, the number of barriers that it has passed. What a thread knows of a block is an epoch
// and some threads: all writes of earlier epochs, and of that epoch those of these threads. A fence takes the thread's
// knowledge, an atomic operation after it (release) leaves it at the address, an acquire (or a relaxed access and a
// fence) takes it from there. __syncwarp gives it to the warp, __syncthreads to the block.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptx {

class Knowledge {
 public:
  void learn(unsigned block, uint64_t epoch, unsigned thread) {
    if (of_block_.size() <= block) of_block_.resize(block + 1);
    Of& of = of_block_[block];
    if (of.threads.empty() || epoch > of.epoch) {
      of.epoch = epoch, of.threads.assign(1, uint16_t(thread));
    } else if (epoch == of.epoch && !of.has(thread)) {
      of.threads.push_back(uint16_t(thread));
    }
  }
  void learn(const Knowledge& other) {
    for (unsigned block = 0; block < other.of_block_.size(); ++block) {
      const Of& of = other.of_block_[block];
      for (const uint16_t thread : of.threads) learn(block, of.epoch, thread);
    }
  }
  bool has(unsigned block, uint64_t epoch, unsigned thread) const {
    if (block >= of_block_.size() || of_block_[block].threads.empty()) return false;
    const Of& of = of_block_[block];
    return of.epoch > epoch || (of.epoch == epoch && of.has(thread));
  }
  bool empty() const { return of_block_.empty(); }
  void forget() { of_block_.clear(); }

 private:
  struct Of {
    uint64_t epoch = 0;
    std::vector<uint16_t> threads;
    bool has(unsigned thread) const { return std::find(threads.begin(), threads.end(), thread) != threads.end(); }
  };
  std::vector<Of> of_block_;
};

// Who wrote to 8 bytes of global memory last, and which of them. Not all writes are kept: a newer one takes the place
// of an older one of the same 8 bytes, or of some others.
struct Write {
  uint64_t piece;  // the address / 8
  uint64_t launch, epoch;
  uint32_t block;
  uint16_t thread;
  uint8_t bytes;  // a bit for each

  bool by_same(const Write& other) const {
    return piece == other.piece && launch == other.launch && epoch == other.epoch && block == other.block &&
           thread == other.thread;
  }
};

class MemoryOrder {
 public:
  explicit MemoryOrder(unsigned blocks) : blocks_(blocks) { ++launch_; }

  // -- a block
  uint64_t epoch(unsigned block) const { return blocks_[block].epoch; }
  void arrive(unsigned block, const Knowledge& own) { blocks_[block].arriving.learn(own); }
  // After a barrier, for every thread; the first one moves the block on.
  void passed(unsigned block, uint64_t barriers) {
    Block& b = blocks_[block];
    if (b.epoch == barriers) return;
    b.epoch = barriers, b.known.learn(b.arriving), b.arriving.forget();
  }

  // -- a warp: before and after __syncwarp. What earlier ones made known stays known.
  void arrive_in_warp(unsigned block, unsigned thread, const Knowledge& own) {
    Knowledge& warp = warps_[uint64_t(block) << 32 | thread / 32];
    warp.learn(own);
    warp.learn(block, blocks_[block].epoch, thread);
  }
  void passed_in_warp(unsigned block, unsigned thread, Knowledge& own) {
    own.learn(warps_[uint64_t(block) << 32 | thread / 32]);
  }

  // -- a thread
  // What a release by this thread makes known.
  std::shared_ptr<const Knowledge> take(unsigned block, unsigned thread, const Knowledge& own) const {
    auto all = std::make_shared<Knowledge>(blocks_[block].known);
    all->learn(own);
    all->learn(block, blocks_[block].epoch, thread);
    return all;
  }
  void release(uint64_t address, const Knowledge& all) { released_[address].learn(all); }
  void acquire(uint64_t address, Knowledge& own) const {
    if (const auto found = released_.find(address); found != released_.end()) own.learn(found->second);
  }

  // -- memory
  static void wrote(uint64_t address, size_t bytes, unsigned block, unsigned thread, uint64_t epoch) {
    for (uint64_t piece = address / 8; piece <= (address + bytes - 1) / 8; ++piece) {
      Write now{piece, launch_, epoch, block, uint16_t(thread), bits(piece, address, bytes)};
      Write& last = slot(piece);
      if (last.by_same(now)) now.bytes |= last.bytes;
      last = now;
    }
  }
  void check_read(uint64_t address, size_t bytes, unsigned block, unsigned thread, const Knowledge& own,
                  simt::Where w) const {
    for (uint64_t piece = address / 8; piece <= (address + bytes - 1) / 8; ++piece) {
      const Write& last = slot(piece);
      if (last.piece != piece || last.launch != launch_ || !(last.bytes & bits(piece, address, bytes))) continue;
      const Block& mine = blocks_[block];
      if (last.block == block && (last.thread == thread || last.epoch < mine.epoch)) continue;
      if (own.has(last.block, last.epoch, last.thread)) continue;
      if (last.block != block && mine.known.has(last.block, last.epoch, last.thread)) continue;
      simt::fail("reads what block " + std::to_string(last.block) + " thread " + std::to_string(last.thread) +
                     " wrote, with no release, acquire and barrier in between",
                 w);
    }
  }

 private:
  struct Block {
    uint64_t epoch = 0;
    Knowledge known, arriving;
  };
  static constexpr size_t kept = size_t(1) << 20;
  static inline uint64_t launch_ = 0;
  // The bytes of a piece that are between address and address + bytes.
  static uint8_t bits(uint64_t piece, uint64_t address, size_t bytes) {
    const uint64_t from = std::max(address, piece * 8) - piece * 8;
    const uint64_t to = std::min(address + bytes, piece * 8 + 8) - piece * 8;
    return uint8_t((0xff << from) & (0xff >> (8 - to)));
  }
  static Write& slot(uint64_t piece) {
    static Write* const writes = static_cast<Write*>(mmap(nullptr, kept * sizeof(Write), PROT_READ | PROT_WRITE,
                                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return writes[piece % kept];
  }
  std::vector<Block> blocks_;
  std::unordered_map<uint64_t, Knowledge> released_, warps_;
};

}  // namespace ptx
