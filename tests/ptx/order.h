// The order of memory between the threads of a launch, as PTX promises it: what a block may know of the writes of
// others. A read of global memory that another thread wrote without release and acquire in between is an error,
// whatever the schedule; so a missing fence, a relaxed load or a missing barrier is seen, not only what it may lead to.
//
// Time in a block is its epoch, the number of barriers that it has passed. What a thread knows of a block is an epoch
// and a thread: all writes of earlier epochs, and of that epoch those of this thread. A fence takes the thread's
// knowledge, an atomic operation or store after it (release) leaves it at the address, an acquire (or a relaxed access
// and a fence) takes it from there, and the next barrier gives it to the block.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptx {

class Knowledge {
 public:
  void learn(unsigned block, uint64_t epoch, unsigned thread) { at(block) = std::max(at(block), pack(epoch, thread)); }
  void learn(const Knowledge& other) {
    if (of_block_.size() < other.of_block_.size()) of_block_.resize(other.of_block_.size());
    for (size_t i = 0; i < other.of_block_.size(); ++i) of_block_[i] = std::max(of_block_[i], other.of_block_[i]);
  }
  bool has(unsigned block, uint64_t epoch, unsigned thread) const {
    if (block >= of_block_.size()) return false;
    const uint64_t known = of_block_[block];
    return known >> 16 > epoch || known == pack(epoch, thread);
  }
  bool empty() const { return of_block_.empty(); }
  void forget() { of_block_.clear(); }

 private:
  std::vector<uint64_t> of_block_;

  static uint64_t pack(uint64_t epoch, unsigned thread) { return epoch << 16 | (thread + 1); }
  uint64_t& at(unsigned block) {
    if (of_block_.size() <= block) of_block_.resize(block + 1);
    return of_block_[block];
  }
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
  std::unordered_map<uint64_t, Knowledge> released_;
};

}  // namespace ptx
