// In: a kernel and the shape of its launch. Out: the kernel executed, every CUDA thread a fiber of the calling thread,
// in an order that is a function of a seed; or simt::error, which says what the kernel did wrong, and where.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace simt {

using Where = std::source_location;

struct error : std::runtime_error {
  using runtime_error::runtime_error;
};

// Read once from the environment: FASTBN_SIMT_ and a name; tests assign. The default is a small GPU, so that small
// tensors already need several blocks a channel and several waves.
struct Config {
  int64_t device = 0;  // its number: another one for each set of the properties below, because the backend keeps them
  uint64_t seed = from_environment("SEED", 0);  // 0: in turn, block by block; others: random, and unfair
  // Blocks of an ordinary launch that run at the same time. A GPU promises one; 0: that for seed 0, others vary it.
  int64_t resident = from_environment("RESIDENT", 0);
  int64_t multiprocessors = from_environment("MULTIPROCESSORS", 4);
  int64_t shared_per_multiprocessor = from_environment("SHARED_PER_MULTIPROCESSOR", 64 << 10);
  int64_t shared_per_block = from_environment("SHARED_PER_BLOCK", 48 << 10);
  int64_t shared_reserved = from_environment("SHARED_RESERVED", 1 << 10);
  int64_t registers_per_multiprocessor = from_environment("REGISTERS", 64 << 10);
  int64_t registers_per_thread = from_environment("REGISTERS_PER_THREAD", 64);
  int64_t threads_per_multiprocessor = from_environment("THREADS", 2048);
  bool cooperative = from_environment("COOPERATIVE", 1) != 0;
  int64_t cluster = from_environment("CLUSTER", 1);                  // blocks of the largest cluster
  int64_t merged_at_once = from_environment("MERGED_AT_ONCE", 512);  // records; the planner's limit
  // Blocks of a cooperative launch that other programs leave room for, which the properties do not tell.
  int64_t cooperative_blocks = from_environment("COOPERATIVE_BLOCKS", 1 << 30);
  int64_t bytes_per_microsecond = from_environment("BYTES_PER_MICROSECOND", 100000);

  static int64_t from_environment(const char* name, int64_t otherwise) {
    const char* text = std::getenv((std::string("FASTBN_SIMT_") + name).c_str());
    return text == nullptr || *text == 0 ? otherwise : std::strtoll(text, nullptr, 0);
  }
};
inline Config config;

struct Stats {
  uint64_t launches, blocks, switches;
  uint64_t bytes_read, bytes_written;  // by load*, copy16 and store*
  uint64_t fresh_bytes, atomics;       // by load_fresh*; atomic operations and load_acquire
  uint64_t translated;                 // launches of translated PTX (translated.h)
  uint64_t queries;                    // of the numbers of the device and of resident blocks
};
inline Stats stats;

// How often each byte of a tensor was read and written, as long as this lives.
struct Watch {
  const char* begin;
  std::vector<uint8_t> reads, writes;

  Watch(const void* data, size_t bytes);
  ~Watch();
  Watch(const Watch&) = delete;
};
inline std::vector<Watch*> watches;
inline Watch::Watch(const void* data, size_t bytes)
    : begin(static_cast<const char*>(data)), reads(bytes), writes(bytes) {
  watches.push_back(this);
}
inline Watch::~Watch() { watches.erase(std::find(watches.begin(), watches.end(), this)); }

enum class State : uint8_t { done, ready, spinning, waiting };

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;  // nullptr: not a CUDA thread, but the caller of launch()
  unsigned thread = 0, lane = 0;
  State state = State::done;
  const char* what = "";  // it is doing, if it does not run
  Where where{};
  uint64_t polled = 0;  // Machine::progress at its last poll in vain
  unsigned mask = 0;    // of the warp collective it waits in, the lane that it reads, what it gives and gets
  int source = 0;
  unsigned slot = 0;
  uint64_t given = 0, got = 0;
  unsigned cluster_phase = 0;  // of the barrier of its cluster that it arrived at
  bool in_cluster_barrier = false;
  bool fenced = false;               // since the last barrier
  std::vector<const void*> atomics;  // that it read since the last fence
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> copies;     // asynchronous ones, not yet performed
  std::vector<size_t> commits;  // how many of them each commit closes
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned alive = 0, waiting = 0, sequence = 0;
  char order[8]{};  // TSan: one object for each of the latest collectives
};

// Fibers that could run, in the order that they became so.
struct Queue {
  std::vector<Fiber*> slots = std::vector<Fiber*>(1024);
  unsigned first = 0, size = 0;

  Fiber*& at(unsigned i) { return slots[(first + i) % 1024]; }
  void push(Fiber* f) { at(size++) = f; }
  Fiber* pop() { return --size, slots[first++ % 1024]; }
};

struct Block {
  unsigned index = 0, threads = 0, live = 0, exited = 0;
  char* shared = nullptr;
  Fiber* fibers = nullptr;
  std::vector<Warp> warps;
  Queue ready[2];
  // __syncthreads
  unsigned arrived = 0, phase = 0, votes[2]{};
  Where where{};
  std::vector<Fiber*> waiters;
  struct Cluster* cluster = nullptr;
};

// Blocks that meet at barriers of their own, in two steps, and read each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0, phase = 0;
  Where where{};
  std::vector<Fiber*> waiters;
  char order[2]{};  // TSan: one object for each phase
};

struct Machine {
  std::mutex mutex;
  uint64_t launch = 0, random = 1, progress = 0, picks = 0;
  unsigned blocks = 0, threads = 0;
  bool cooperative = false;
  size_t dynamic_bytes = 0, static_bytes = 0, static_top = 0, arena = 0;
  std::vector<std::pair<size_t, Where>> ends;  // of arrays in shared memory
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Block> slots;
  std::vector<Cluster> clusters;
  Block* current = nullptr;
  size_t ready[2]{};  // [1] only runs when [0] is empty
  size_t stale = 0;   // spinning fibers that polled in vain since the last progress
  unsigned countdown = 0;
  std::exception_ptr failure;
  char *stacks = nullptr, *shared = nullptr;
  size_t stacks_bytes = 0, shared_bytes = 0;
  char began = 0, ended = 0;  // TSan: a launch happens before every thread, every thread before its return
  std::vector<uint64_t> written =
      std::vector<uint64_t>(1 << 14);  // 16-byte pieces that this launch wrote, some of them
};
inline Machine machine;
inline Fiber host;
inline Fiber* self = &host;

struct Index {
  unsigned x;
};

}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;  // the former two change at every switch

namespace simt {

inline std::string place(const Where& w) {
  const char* slash = std::strrchr(w.file_name(), '/');
  return std::string(slash ? slash + 1 : w.file_name()) + ":" + std::to_string(w.line());
}
inline std::string name(const Fiber& f) {
  return "block " + std::to_string(f.block->index) + " thread " + std::to_string(f.thread);
}
inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// In a fiber this unwinds its stack, then the launch ends with the error.
[[noreturn]] inline void fail(const std::string& message, Where w = Where::current()) {
  throw error("simt: " + message + ", at " + place(w) + (self->block ? " by " + name(*self) : "") + " [seed " +
              std::to_string(config.seed) + "]");
}

inline uint64_t random_below(uint64_t n) {  // xorshift64*
  uint64_t& x = machine.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return (x * 0x2545f4914f6cdd1d >> 33) % n;
}

// ---- scheduling ----------------------------------------------------------------------------------------------------

inline void enter(Fiber* f) {
  self = f;
  if (f->block != nullptr) threadIdx.x = f->thread, blockIdx.x = f->block->index;
}

inline void switch_to(Fiber* to) {
  Fiber* from = self;
  if (from == to) return;
  if (from->block != nullptr && *reinterpret_cast<uint64_t*>(from->context.stack) != canary) {
    fail("stack overflow: more than " + std::to_string(stack_bytes >> 10) + " KB of local variables", from->where);
  }
  ++stats.switches;
  enter(to);
  switch_context(from->context, to->context);
}

inline void made_progress() { ++machine.progress, machine.stale = 0; }

// Random schedules also hold back some warps, blocks or lanes by seed % 4, other ones as time goes by. Who polls in
// vain comes after all others.
inline void enqueue(Fiber* f) {
  Machine& m = machine;
  bool slow = f->state == State::spinning;
  if (config.seed != 0 && slow) slow = config.seed & 4 || random_below(4) != 0;
  if (const uint64_t kind = config.seed % 4; kind != 0 && !slow) {
    const uint64_t unit = uint64_t(f - m.fibers.data()) / (kind == 1 ? 32 : kind == 2 ? m.threads : 1);
    slow = ((unit * 0x9e3779b97f4a7c15 ^ config.seed << 20 ^ m.picks >> 12) * 0xbf58476d1ce4e5b9 >> 40) & 1;
  }
  f->block->ready[slow].push(f), ++m.ready[slow];
}

inline void wake(Fiber* f) {
  f->state = State::ready;
  enqueue(f);
}

[[noreturn]] inline void deadlock() {
  std::map<std::string, std::pair<int, const Fiber*>> waiters;
  for (const Fiber& f : machine.fibers) {
    if (f.block == nullptr || f.state == State::done) continue;
    auto& entry = waiters[std::string(f.what) + " at " + place(f.where)];
    if (entry.first++ == 0) entry.second = &f;
  }
  std::string text = "deadlock, with " + std::to_string(machine.slots.size()) + " of " +
                     std::to_string(machine.blocks) + " blocks resident:";
  for (const auto& [where, entry] : waiters) {
    text += "\n    " + std::to_string(entry.first) + " threads in " + where + ", for example " + name(*entry.second);
  }
  fail(text + "\n   ", self->where);
}

// Seed 0 stays with a block as long as it can run, because its stacks are in the cache; others leave it now and then.
inline Fiber* next() {
  Machine& m = machine;
  if (m.ready[0] + m.ready[1] == 0) deadlock();
  const int level = m.ready[0] == 0;
  const bool random = config.seed != 0;
  if (m.current->ready[level].size == 0 || level == 1 || (random && random_below(1 + config.seed % 8) == 0)) {
    const size_t count = m.slots.size();
    size_t i = random ? random_below(count) : size_t(m.current - m.slots.data()) + 1;
    while (m.slots[i % count].ready[level].size == 0) ++i;
    m.current = &m.slots[i % count];
  }
  Queue& queue = m.current->ready[level];
  if (random) std::swap(queue.at(0), queue.at(unsigned(random_below(queue.size)))), ++m.picks;
  --m.ready[level];
  Fiber* f = queue.pop();
  if (f->state != State::spinning) f->state = State::ready, made_progress();
  return f;
}

inline void leave(State state, const char* what, Where w) {
  self->state = state, self->what = what, self->where = w;
  if (state != State::waiting) enqueue(self);
  switch_to(next());
}

// Somebody else's turn, in random schedules.
inline void maybe_leave(Where w) {
  Quiet quiet;
  if (config.seed != 0 && self->state != State::spinning && random_below(2)) leave(State::ready, "running", w);
}

// A condition was polled and is false. If everybody who can run has done that since anything happened, it is a
// deadlock.
inline void polled(Where w) {
  Quiet quiet;
  Machine& m = machine;
  if (self->state != State::spinning || self->polled != m.progress) ++m.stale;
  self->polled = m.progress;
  self->state = State::spinning, self->what = "wait_until", self->where = w;
  if (m.stale == m.ready[0] + m.ready[1] + 1) deadlock();
  leave(State::spinning, "wait_until", w);
}
inline void polled_well() {
  Quiet quiet;
  if (self->state == State::spinning) self->state = State::ready, made_progress();
}

// ---- __syncthreads -------------------------------------------------------------------------------------------------

inline unsigned sync_block(unsigned vote, Where w) {
  Quiet quiet;
  Block& b = *self->block;
  const char* what = "__syncthreads";
  if (b.exited != 0) fail(std::string(what) + ": " + std::to_string(b.exited) + " threads of the block have exited", w);
  if (b.arrived == 0) b.where = w;
  if (!same(b.where, w)) fail(std::string("divergent ") + what + ": other threads wait at " + place(b.where), w);
  // One object for each phase: who leaves early must not order who leaves late.
  unsigned& votes = b.votes[b.phase & 1];
  release(&votes);
  votes += vote;
  if (++b.arrived < b.threads) {
    b.waiters.push_back(self);
    leave(State::waiting, what, w);
  } else {
    b.arrived = 0;
    b.votes[++b.phase & 1] = 0;
    for (Fiber* f : b.waiters) wake(f);
    b.waiters.clear();
    if (config.seed != 0) leave(State::ready, what, w);
  }
  acquire(&votes);
  self->fenced = false;
  return votes;
}

// ---- clusters ------------------------------------------------------------------------------------------------------

inline Cluster& own_cluster(const char* what, Where w) {
  Cluster* const cluster = self->block->cluster;
  if (cluster == nullptr) fail(std::string(what) + " without a cluster", w);
  return *cluster;
}

inline void cluster_arrive(Where w) {
  Quiet quiet;
  Cluster& c = own_cluster("barrier of a cluster", w);
  if (self->in_cluster_barrier) fail("arrives twice at the barrier of a cluster", w);
  for (const Block* b : c.blocks) {
    if (b->exited != 0) fail("barrier of a cluster: threads of a block have exited", w);
  }
  release(&c.order[c.phase & 1]);
  self->in_cluster_barrier = true, self->cluster_phase = c.phase;
  if (++c.arrived < c.blocks.size() * machine.threads) return;
  c.arrived = 0, ++c.phase;
  for (Fiber* f : c.waiters) wake(f);
  c.waiters.clear();
}

inline void cluster_wait(Where w) {
  Quiet quiet;
  Cluster& c = own_cluster("barrier of a cluster", w);
  if (!self->in_cluster_barrier) fail("waits at the barrier of a cluster without arriving", w);
  if (c.phase == self->cluster_phase) {
    c.waiters.push_back(self);
    leave(State::waiting, "barrier of a cluster", w);
  } else if (config.seed != 0) {
    leave(State::ready, "barrier of a cluster", w);
  }
  self->in_cluster_barrier = false;
  acquire(&c.order[self->cluster_phase & 1]);
}

// The place of p, in the shared memory of this block, in that of another one.
inline char* in_cluster(const void* p, unsigned rank, Where w) {
  Cluster& c = own_cluster("an address of another block", w);
  if (rank >= c.blocks.size()) fail("no block of the cluster has rank " + std::to_string(rank), w);
  const Block& other = *c.blocks[rank];
  if (other.exited != 0) fail("reads the shared memory of a block that has exited", w);
  const size_t at = size_t(static_cast<const char*>(p) - self->block->shared);
  if (at >= machine.arena) fail("not an address in the shared memory of this block", w);
  return other.shared + at;
}

// ---- warps: a rendezvous of the lanes in a mask --------------------------------------------------------------------

// combine(lanes, lane) is called for every lane when all are there. Shuffles do not order memory; __syncwarp does.
template <class Combine>
void meet(const char* what, unsigned mask, Where w, bool ordered, Combine&& combine) {
  Fiber* me = self;
  Warp& warp = me->block->warps[me->thread / 32];
  const auto check = [&](const Fiber& other) {
    if (other.what == what && other.mask == mask && same(other.where, w)) return;
    char text[160];
    std::snprintf(text, sizeof text, "warp divergence: %s with mask %08x meets %s with mask %08x of lane %u at ", what,
                  mask, other.what, other.mask, other.lane);
    fail(text + place(other.where), w);
  };
  if (!(mask >> me->lane & 1)) fail(std::string(what) + ": the calling lane is not in its own mask", w);
  if (mask & ~warp.alive) fail(std::string(what) + ": the mask names a lane that has exited or does not exist", w);
  const unsigned there = warp.waiting & mask;
  if (there != 0) check(warp.lanes[__builtin_ctz(there)]);
  me->slot = there != 0 ? warp.lanes[__builtin_ctz(there)].slot : warp.sequence++ % 8;
  if (ordered) release(&warp.order[me->slot]);
  me->mask = mask, me->what = what, me->where = w;
  warp.waiting |= 1u << me->lane;
  if ((warp.waiting & mask) != mask) {
    leave(State::waiting, what, w);
  } else {
    for (unsigned m = mask; m != 0; m &= m - 1) check(warp.lanes[__builtin_ctz(m)]);
    for (unsigned m = mask; m != 0; m &= m - 1) combine(warp.lanes, warp.lanes[__builtin_ctz(m)]);
    warp.waiting &= ~mask;
    for (unsigned m = mask; m != 0; m &= m - 1) {
      if (Fiber* f = &warp.lanes[__builtin_ctz(m)]; f != me) wake(f);
    }
    if (config.seed != 0) leave(State::ready, what, w);
  }
  if (ordered) acquire(&warp.order[me->slot]);
}

inline uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int source, Where w) {
  Quiet quiet;
  self->source = source, self->given = value;
  meet(what, mask, w, false, [&](Fiber* lanes, Fiber& f) {
    if (!(mask >> f.source & 1)) {
      fail(std::string(what) + ": lane " + std::to_string(f.lane) + " reads lane " + std::to_string(f.source) +
               ", which is not in the mask",
           w);
    }
    f.got = lanes[f.source].given;
  });
  return self->got;
}

inline unsigned ballot(unsigned mask, bool vote, Where w) {
  Quiet quiet;
  self->given = uint64_t(vote) << self->lane;
  meet("__ballot_sync", mask, w, false, [&](Fiber* lanes, Fiber& f) {
    f.got = 0;
    for (unsigned m = mask; m != 0; m &= m - 1) f.got |= lanes[__builtin_ctz(m)].given;
  });
  return unsigned(self->got);
}

// ---- memory --------------------------------------------------------------------------------------------------------

inline void check_alignment(const void* p, size_t bytes, Where w) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  Quiet quiet;
  fail("misaligned address: " + std::to_string(bytes) + " bytes at an address that is " +
           std::to_string(reinterpret_cast<uintptr_t>(p) % bytes) + " more than a multiple of it",
       w);
}

enum class Access : uint8_t { read, read_only, write };  // read_only: by way of a cache that does not see writes

// A global address, before the access to it.
inline void note_global(const void* p, size_t bytes, Access access, Where w) {
  Quiet quiet;
  Machine& m = machine;
  check_alignment(p, bytes, w);
  const char* address = static_cast<const char*>(p);
  if (address >= m.shared && address < m.shared + m.shared_bytes) fail("shared memory accessed as global memory", w);
  (access == Access::write ? stats.bytes_written : stats.bytes_read) += bytes;
  const uint64_t piece = reinterpret_cast<uintptr_t>(p) / 16 << 16 | (m.launch & 0xffff);
  uint64_t& written = m.written[(piece >> 16) % m.written.size()];
  if (access == Access::write) written = piece;
  if (access == Access::read_only && written == piece) fail("load() of what this launch wrote: use load_fresh()", w);
  for (Watch* watch : watches) {
    const size_t at = size_t(address - watch->begin);
    auto& counts = access == Access::write ? watch->writes : watch->reads;
    if (at < counts.size()) {
      for (size_t i = 0; i < bytes; ++i) ++counts[at + i];
    }
  }
  // A thread runs until it has to wait; random schedules also stop it at some of its accesses.
  if (config.seed != 0 && --m.countdown == 0) {
    m.countdown = 1 + unsigned(random_below(256));
    maybe_leave(w);
  }
}

// A shared address, before the access to it.
inline void check_shared(const void* p, size_t bytes, Where w) {
  check_alignment(p, bytes, w);
  const size_t at = size_t(static_cast<const char*>(p) - self->block->shared);
  if (at < machine.arena) return;
  Quiet quiet;
  fail("not an address in the shared memory of this block", w);
}

// Before a thread reads shared memory: its own copies to there have been waited for. Their NaN alone would not tell,
// because kernels sum again where the first attempt gave NaN.
inline void check_copied(const void* p, size_t bytes, Where w) {
  for (const Fiber::Copy& c : self->copies) {
    const char *to = static_cast<const char*>(c.to), *from = static_cast<const char*>(p);
    if (from < to + 16 && to < from + bytes) fail("reads an asynchronous copy of its own before waiting for it", w);
  }
}

// An asynchronous copy. Until it is waited for, the destination is undefined: here, NaN. To TSan the thread writes it
// both now and then.
inline void start_copy(void* to, const void* from, Where w) {
  check_shared(to, 16, w);
  note_global(from, 16, Access::read, w);
  for (int i = 0; i < 2; ++i) static_cast<volatile uint64_t*>(to)[i] = ~uint64_t(0);
  Quiet quiet;
  self->where = w;
  self->copies.push_back({to, from});
}
inline void commit_copies() {
  Quiet quiet;
  self->commits.push_back(self->copies.size());
}
inline void finish_copies(size_t all_but) {
  auto& commits = self->commits;
  if (commits.size() <= all_but) return;
  const size_t closed = commits.size() - all_but, count = commits[closed - 1];
  for (size_t i = 0; i < count; ++i) {
    const auto [to, from] = self->copies[i];
    for (int k = 0; k < 2; ++k) static_cast<volatile uint64_t*>(to)[k] = static_cast<const volatile uint64_t*>(from)[k];
  }
  Quiet quiet;
  self->copies.erase(self->copies.begin(), self->copies.begin() + ptrdiff_t(count));
  commits.erase(commits.begin(), commits.begin() + ptrdiff_t(closed));
  for (size_t& n : commits) n -= count;
}

// TSan does not model fences. Here an atomic write after a fence releases, and a fence acquires from every location
// that was read atomically since the fence before it. Leaving out either is a reported race.
inline void fence(Where w) {
  maybe_leave(w);
  Quiet quiet;
  for (const void* p : self->atomics) acquire(p);
  self->atomics.clear(), self->fenced = true;
}
inline void note_atomic(const void* p, Access access, Where w) {
  check_alignment(p, sizeof(unsigned), w);
  maybe_leave(w);
  Quiet quiet;
  ++stats.atomics;
  if (access == Access::read) return;
  if (SIMT_TSAN) self->atomics.push_back(p);
  if (self->fenced) release(p);
}
inline void note_fresh(const void* p, size_t bytes, Where w) {
  check_alignment(p, bytes, w);
  Quiet quiet;
  stats.fresh_bytes += bytes;
}

// ---- shared memory -------------------------------------------------------------------------------------------------

constexpr size_t gap = 64;                // between arrays: ASan's redzone, and checked without it
constexpr size_t static_room = 64 << 10;  // more than CUDA's 48 KB, for the gaps

inline int64_t blocks_per_multiprocessor(int64_t threads, int64_t shared) {
  const int64_t rounded = (threads + 31) / 32 * 32;
  return std::min({int64_t(32), config.threads_per_multiprocessor / rounded,
                   config.registers_per_multiprocessor / (config.registers_per_thread * rounded),
                   config.shared_per_multiprocessor / std::max<int64_t>(1, shared + config.shared_reserved)});
}

inline void check_fits(Where w) {
  const Machine& m = machine;
  const int64_t bytes = int64_t(m.dynamic_bytes + m.static_bytes);
  const std::string sum =
      std::to_string(m.dynamic_bytes) + " bytes dynamic and " + std::to_string(m.static_bytes) + " bytes static";
  if (bytes > config.shared_per_block || m.static_bytes > 48 << 10) fail("too much shared memory: " + sum, w);
  const int64_t fit = blocks_per_multiprocessor(m.threads, bytes) * config.multiprocessors;
  if (fit == 0) fail("too many resources requested for launch", w);
  if (m.cooperative && m.blocks > fit) {
    fail("cooperative launch too large: " + std::to_string(m.blocks) + " blocks, but " + std::to_string(fit) +
             " fit, with shared memory of " + sum,
         w);
  }
}

// Every FASTBN_SHARED is another Site; an array has the same place in every block of a launch.
template <class T, class Site>
T& static_shared(Where w = Where::current()) {
  static uint64_t launch;
  static size_t offset;
  Quiet quiet;
  Machine& m = machine;
  if (launch != m.launch) {
    offset = m.static_top, launch = m.launch;
    m.static_bytes += sizeof(T);
    m.static_top = (offset + sizeof(T) + gap + 127) / 128 * 128;
    m.ends.push_back({offset + sizeof(T), w});
    check_fits(w);
  }
  char* p = self->block->shared + offset;
  SIMT_UNPOISON(p, sizeof(T));
  return *reinterpret_cast<T*>(p);
}

// ---- launches ------------------------------------------------------------------------------------------------------

inline void thread_exits() {
  Fiber* me = self;
  Block& b = *me->block;
  Warp& warp = b.warps[me->thread / 32];
  me->state = State::done, me->what = "exit";
  if (!me->copies.empty()) fail("thread exits with asynchronous copies that it never waited for", me->where);
  me->commits.clear();
  warp.alive &= ~(1u << me->lane);
  for (unsigned m = warp.waiting; m != 0; m &= m - 1) {
    const Fiber& other = warp.lanes[__builtin_ctz(m)];
    if (other.mask >> me->lane & 1) {
      fail(std::string("lane exits while others wait for it in ") + other.what, other.where);
    }
  }
  ++b.exited;
  if (b.arrived != 0) fail("thread exits while others wait at __syncthreads", b.where);
  if (--b.live != 0) return;
  SIMT_UNPOISON(b.shared, machine.arena);
  for (const auto& [end, where] : machine.ends) {
    for (size_t i = 0; i < gap; ++i) {
      if (b.shared[end + i] != char(0xff)) fail("shared memory: written past the end of an array", where);
    }
  }
}

// A fiber is a thread of one block after the other.
inline void fiber_loop() {
  arrived();
  for (;;) {
    Fiber* to = &host;
    try {
      acquire(&machine.began);
      machine.call(machine.arguments);
      release(&machine.ended);
      Quiet quiet;
      thread_exits();
      if (self->block->live != 0) to = next();  // else the host starts another block
    } catch (...) {
      machine.failure = std::current_exception();
      release(&machine.ended);
    }
    Quiet quiet;
    if (*reinterpret_cast<uint64_t*>(self->context.stack) != canary && !machine.failure) {
      machine.failure = std::make_exception_ptr(error("simt: stack overflow in " + name(*self)));
    }
    if (machine.failure) to = &host;
    *reinterpret_cast<uint64_t*>(self->context.stack) = canary;
    switch_to(to);
  }
}

inline void start_block(Block& b, unsigned index) {
  Machine& m = machine;
  b.index = index, b.threads = b.live = m.threads;
  b.exited = b.arrived = b.votes[0] = b.votes[1] = 0;
  b.warps.assign((m.threads + 31) / 32, {});
  b.waiters.clear();
#if SIMT_TSAN
  // As fresh memory: the block before in this place is not to be ordered before this one, nor to race with it.
  mmap(b.shared, m.arena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#endif
  SIMT_UNPOISON(b.shared, m.arena);
  std::memset(b.shared, 0xff, m.arena);  // NaN in every type
  SIMT_POISON(b.shared + m.dynamic_bytes, m.arena - m.dynamic_bytes);
  ++stats.blocks;
  for (unsigned t = 0; t < m.threads; ++t) {
    Fiber& f = b.fibers[t];
    f.block = &b, f.thread = t, f.lane = t % 32, f.fenced = false, f.atomics.clear(), f.what = "start";
    f.in_cluster_barrier = false;
    Warp& warp = b.warps[t / 32];
    if (f.lane == 0) warp.lanes = &f;
    warp.alive |= 1u << f.lane;
    wake(&f);
  }
}

inline char* map(char*& have, size_t& have_bytes, size_t bytes) {
  if (bytes <= have_bytes) return have;
  if (have != nullptr) munmap(have, have_bytes);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) have = nullptr, have_bytes = 0, fail("no memory for stacks or shared memory");
  have_bytes = bytes;
  return have = static_cast<char*>(p);
}

// New contexts for all fibers: the first time, for more of them, and after an error, which leaves some in mid-kernel.
inline void make_fibers(size_t count) {
  Machine& m = machine;
  // One stack more, below the first, for the first to overflow into.
  char* base = map(m.stacks, m.stacks_bytes, (count + 1) * stack_bytes) + stack_bytes;
  m.fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = m.fibers[i];
    f.state = State::done, f.block = nullptr, f.copies.clear(), f.commits.clear();
    make_context(f.context, base + i * stack_bytes, stack_bytes - i % 32 * 128, fiber_loop);
  }
}

inline void run_blocks(unsigned resident) {
  Machine& m = machine;
  std::vector<unsigned> order(m.blocks);
  for (unsigned i = 0; i < m.blocks; ++i) order[i] = i;
  if (config.seed != 0) {
    for (unsigned i = m.blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  unsigned started = 0;
  for (Block& b : m.slots) start_block(b, order[started++]);
  for (Block& b : m.slots) {
    b.cluster = m.clusters.empty() ? nullptr : &m.clusters[b.index / (m.blocks / unsigned(m.clusters.size()))];
    if (b.cluster != nullptr) b.cluster->blocks[b.index % b.cluster->blocks.size()] = &b;
  }
  for (unsigned running = resident; running != 0;) {
    switch_to(next());  // back here when a block has finished, or something has failed
    if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
    for (Block& b : m.slots) {
      if (b.live != 0 || b.threads == 0) continue;
      b.threads = 0, --running;
      if (started < m.blocks) start_block(b, order[started++]), ++running;
    }
  }
}

inline void run(int64_t blocks, int64_t threads, int64_t dynamic_bytes, bool cooperative, int64_t cluster,
                void (*call)(void*), void* arguments) {
  Machine& m = machine;
  std::lock_guard lock(m.mutex);
  self = &host;
  host.context = {};
  running = &host.context;
#if SIMT_TSAN
  host.context.thread = __tsan_get_current_fiber();
#endif
  Quiet quiet;
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || dynamic_bytes < 0) {
    fail("invalid configuration argument: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
         " threads with " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
  }
  m.blocks = unsigned(blocks), m.threads = unsigned(threads), m.cooperative = cooperative;
  m.dynamic_bytes = size_t(dynamic_bytes), m.static_bytes = 0;
  if (cooperative && !config.cooperative) fail("this device has no cooperative launches");
  if (cluster > config.cluster || blocks % cluster != 0 || (cluster > 1 && !cooperative)) {
    fail("clusters of " + std::to_string(cluster) + " blocks, of " + std::to_string(blocks) + ": not on this device");
  }
  m.clusters.assign(cluster > 1 ? size_t(blocks / cluster) : 0, {});
  for (Cluster& c : m.clusters) c.blocks.resize(size_t(cluster));
  check_fits(Where::current());

  ++m.launch, ++stats.launches;
  m.random = config.seed * 0x9e3779b97f4a7c15 + 1, m.countdown = 1;
  m.call = call, m.arguments = arguments;
  m.static_top = (m.dynamic_bytes + gap + 127) / 128 * 128, m.arena = (m.static_top + static_room + 4095) / 4096 * 4096;
  m.ends.assign(1, {m.dynamic_bytes, Where::current()});
  m.ready[0] = m.ready[1] = m.stale = 0;
  blockDim.x = m.threads, gridDim.x = m.blocks;

  const int64_t fit = blocks_per_multiprocessor(threads, dynamic_bytes) * config.multiprocessors;
  int64_t resident = config.resident;
  if (resident == 0) resident = config.seed == 0 ? 1 : 1 + int64_t(random_below(uint64_t(std::min<int64_t>(8, fit))));
  resident = cooperative ? blocks : std::min({resident, fit, blocks});
  const size_t count = size_t(resident * threads);
  if (SIMT_TSAN && count > 7000) fail("ThreadSanitizer has no room for more than 7000 threads alive");

  if (count > m.fibers.size()) make_fibers(count);
  map(m.shared, m.shared_bytes, size_t(resident) * m.arena);
  m.slots.resize(size_t(resident));
  m.current = m.slots.data();
  for (size_t i = 0; i < m.slots.size(); ++i) {
    Block& b = m.slots[i];
    b.shared = m.shared + i * m.arena, b.fibers = &m.fibers[i * m.threads];
    for (Queue& queue : b.ready) queue.first = queue.size = 0;
  }
  release(&m.began);
  const auto clean = [&] {
    SIMT_UNPOISON(m.shared, m.shared_bytes);
    SIMT_UNPOISON(m.stacks, m.stacks_bytes);
    acquire(&m.ended);
  };
  try {
    run_blocks(unsigned(resident));
  } catch (...) {
    clean();
    make_fibers(m.fibers.size());
    throw;
  }
  clean();
}

}  // namespace simt
