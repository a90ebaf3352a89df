#include "thread.h"

#include "launch.h"

namespace ptx {

struct Thread::State {
  struct Copy {
    uint32_t to;
    uint64_t from;
    unsigned size, given;
    uint32_t arrives;
  };
  Launch& launch;
  std::vector<Copy> copies{};
  std::vector<size_t> commits{};  // how many of the copies each commit closes
  // order
  Knowledge known{}, seen{};  // acquired since the last barrier; what the next fence acquires
  std::shared_ptr<const Knowledge> fenced{};
  int polled = -1;  // the site of the load that is repeated
  uint32_t value = 0;
  uint32_t barriers = 0, cluster_barriers = 0;
  // counting
  WarpCounts* warp = nullptr;
  std::vector<uint32_t> iterations{};
  int last_block = -1;
  uint32_t tensor_arrived = 0, polling_since = 0, shuffles = 0;
  size_t next_value = 0;  // of Counting::atomics
  uint64_t key = 0;
  bool stored = false, tile_loaded = false;
};

uint32_t Thread::tid() const { return simt::self->thread; }
uint32_t Thread::ctaid() const { return simt::self->block->index; }
uint32_t Thread::ntid() const { return simt::machine.threads; }
uint32_t Thread::nctaid() const { return simt::machine.blocks; }
uint32_t Thread::laneid() const { return simt::self->lane; }

uint64_t Thread::globaltimer(Where w) {
  static uint64_t clock = 1;
  nanosleep(w);
  return clock += 1024;
}

void Thread::nanosleep(Where w) {
  simt::Quiet quiet;
  simt::leave(simt::State::ready, "nanosleep", w);
}

Thread::Thread(Launch& launch) : state_(new State{launch}), shared_(simt::self->block->shared) {
  place_statics();
  if (launch.counting == nullptr) return;
  simt::Quiet quiet;
  const unsigned warps = (simt::machine.threads + 31) / 32;
  state_->warp = &launch.counting->warps[ctaid() * warps + tid() / 32];
  state_->iterations.assign(size_t(launch.entry.loop_count), 0);
  ++launch.counting->counts.threads;
}

Thread::~Thread() = default;

void Thread::exits() {
  if (!state_->copies.empty()) simt::fail("thread exits with asynchronous copies that it never waited for");
  if (state_->warp == nullptr) return;
  simt::Quiet quiet;
  Counts& counts = state_->launch.counting->counts;
  counts.round_trips = std::max(counts.round_trips, now_);
  if (tid() == 0) ++counts.blocks, counts.block_barriers += state_->barriers;
  const unsigned lanes = std::min(32u, ntid() - tid() / 32 * 32);
  if (++state_->warp->exited == lanes) state_->launch.counting->finish(*state_->warp);
}

// Behind the dynamic array, with gaps that must stay as they are.
void Thread::place_statics() {
  if (state_->launch.entry.statics.empty()) return;
  simt::Quiet quiet;
  simt::Machine& m = simt::machine;
  const auto aligned = [](size_t at) { return (at + simt::gap + 127) / 128 * 128; };
  size_t at = aligned(m.dynamic_bytes);
  for (const Extent& e : state_->launch.entry.statics) {
    statics.push_back(uint32_t(at));
    if (m.static_top <= at) {
      m.static_bytes += e.bytes, m.static_top = aligned(at + e.bytes);
      m.ends.push_back({at + e.bytes, Where::current()});
      simt::check_fits(Where::current());
    }
    SIMT_UNPOISON(shared_ + at, e.bytes);
    at = aligned(at + e.bytes);
  }
}

// ---- memory --------------------------------------------------------------------------------------------------------

void Thread::not_shared(uint64_t at, Where w) const {
  if (at - address(shared_) < simt::machine.arena) simt::fail("generic access to shared memory", w);
}

void Thread::check_param(uint64_t at, size_t bytes, Where w) const {
  const Launch& launch = state_->launch;
  if (at % bytes == 0 && at - address(launch.params) + bytes <= launch.params_bytes) return;
  simt::fail("not an address in the parameters", w);
}

void Thread::before_shared_write(uint32_t at, size_t bytes, int site, Where w) {
  simt::check_shared(shared_ + at, bytes, w);
  note(site, at);
}

void Thread::before_shared_read(uint32_t at, size_t bytes, int site, Where w) {
  simt::check_shared(shared_ + at, bytes, w);
  for (const State::Copy& c : state_->copies) {
    if (at < c.to + c.size && c.to < at + bytes) {
      simt::fail("reads an asynchronous copy of its own before waiting for it", w);
    }
  }
  note(site, at);
}

uint64_t Thread::before_cluster_read(uint32_t at, size_t bytes, int site, Where w) {
  if (at >> 24 == 0) simt::fail("an address of this block's shared memory where one of another is needed", w);
  char* const own = shared_ + (at & 0xffffff);
  simt::check_shared(own, bytes, w);
  note(site, at);
  return address(simt::in_cluster(own, (at >> 24) - 1, w));
}

void Thread::cluster_arrive(Where w) {
  {
    simt::Quiet quiet;
    if (state_->warp != nullptr) {
      uint32_t& latest =
          state_->launch.counting->cluster_clocks[simt::self->block->cluster][state_->cluster_barriers & 1];
      latest = std::max(latest, now_);
    }
  }
  simt::cluster_arrive(w);
}

void Thread::cluster_wait(Where w) {
  simt::cluster_wait(w);
  simt::Quiet quiet;
  if (state_->warp != nullptr) {
    now_ = state_->launch.counting->cluster_clocks[simt::self->block->cluster][state_->cluster_barriers & 1];
  }
  ++state_->cluster_barriers;
}

void Thread::before_global_read(uint64_t at, size_t bytes, way how, int site, Where w) {
  const void* p = reinterpret_cast<const void*>(at);
  if (how == way::fresh) {
    simt::note_fresh(p, bytes, w);
  } else {
    simt::note_global(p, bytes, how == way::read_only ? simt::Access::read_only : simt::Access::read, w);
  }
  simt::Quiet quiet;
  state_->launch.order.check_read(at, bytes, ctaid(), tid(), state_->known, w);
  note(site, at);
  arrives = now_ + 1;
  if (state_->warp != nullptr && in_tensor(at))
    state_->tensor_arrived = std::max(state_->tensor_arrived, arrives), state_->tile_loaded = true;
}

void Thread::before_global_write(uint64_t at, size_t bytes, int site, Where w) {
  simt::note_global(reinterpret_cast<const void*>(at), bytes, simt::Access::write, w);
  simt::Quiet quiet;
  MemoryOrder::wrote(at, bytes, ctaid(), tid(), state_->launch.order.epoch(ctaid()));
  note(site, at);
  state_->stored = true;
  if (state_->warp == nullptr || !state_->tile_loaded || !in_tensor(at)) return;
  uint32_t& most = state_->launch.counting->counts.tile_round_trips;
  if (now_ > state_->tensor_arrived) most = std::max(most, now_ - state_->tensor_arrived);
  state_->tile_loaded = false, state_->tensor_arrived = 0;
}

// ---- asynchronous copies: until they are performed, what they will write is NaN -------------------------------------

void Thread::copy_async(uint32_t to, uint64_t from, unsigned size, unsigned given, int site, Where w) {
  given = std::min(size, given);
  simt::check_shared(shared_ + to, size, w);
  simt::check_alignment(reinterpret_cast<const void*>(from), size, w);
  // As many bytes as it is given are read; the number need not be a power of two.
  for (unsigned at = 0; at < given; at += 4) {
    simt::note_global(reinterpret_cast<const void*>(from + at), std::min(4u, given - at), simt::Access::read, w);
  }
  simt::Quiet quiet;
  state_->launch.order.check_read(from, given, ctaid(), tid(), state_->known, w);
  note(site, from);
  std::memset(shared_ + to, 0xff, size);
  state_->copies.push_back({to, from, size, given, now_ + 1});
  if (state_->warp != nullptr && in_tensor(from))
    state_->tensor_arrived = std::max(state_->tensor_arrived, now_ + 1), state_->tile_loaded = true;
}

void Thread::copies_commit() {
  simt::Quiet quiet;
  state_->commits.push_back(state_->copies.size());
}

void Thread::copies_wait(size_t all_but) {
  if (state_->commits.size() <= all_but) return;
  const size_t closed = state_->commits.size() - all_but, count = state_->commits[closed - 1];
  for (size_t i = 0; i < count; ++i) {
    const State::Copy& c = state_->copies[i];
    std::memcpy(shared_ + c.to, reinterpret_cast<const void*>(c.from), c.given);
    std::memset(shared_ + c.to + c.given, 0, c.size - c.given);
    wait_for(c.arrives);
  }
  simt::Quiet quiet;
  state_->copies.erase(state_->copies.begin(), state_->copies.begin() + ptrdiff_t(count));
  state_->commits.erase(state_->commits.begin(), state_->commits.begin() + ptrdiff_t(closed));
  for (size_t& n : state_->commits) n -= count;
}

// ---- blocks that talk to each other --------------------------------------------------------------------------------

void Thread::fence(Where w) {
  if (state_->stored) ++now_;  // it waits for the stores before it
  state_->stored = false;
  simt::fence(w);
  simt::Quiet quiet;
  state_->known.learn(state_->seen);
  state_->seen.forget();
  state_->fenced = state_->launch.order.take(ctaid(), tid(), state_->known);
}

// The same load again by the same thread is a poll: others go on.
uint32_t Thread::ld_ordered(uint64_t at, order how, int site, Where w) {
  const unsigned* p = reinterpret_cast<const unsigned*>(at);
  const bool again = state_->polled == site;
  if (state_->warp != nullptr) return poll_counted(at, again, how, site, w);
  if (again) simt::polled(w);
  simt::note_atomic(p, simt::Access::read, w);
  state_->launch.order.acquire(at, how == order::acquire ? state_->known : state_->seen);
  const uint32_t got = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  if (again && got != state_->value) simt::polled_well();
  state_->polled = site, state_->value = got;
  return got;
}

uint32_t Thread::poll_counted(uint64_t at, bool again, order how, int site, Where w) {
  const unsigned* p = reinterpret_cast<const unsigned*>(at);
  const auto& written = state_->launch.counting->atomics[at];
  if (!again) note(site, at), state_->polling_since = now_, ++state_->launch.counting->counts.group_barriers;
  const bool news = again && state_->next_value + 1 < written.size();
  if (again && !news) simt::polled(w);
  if (again && state_->next_value + 1 < written.size()) {
    ++state_->next_value;
    if (!news) simt::polled_well();
  }
  simt::note_atomic(p, simt::Access::read, w);
  state_->launch.order.acquire(at, how == order::acquire ? state_->known : state_->seen);
  state_->polled = site;
  if (state_->next_value < written.size()) {
    arrives = std::max(state_->polling_since, written[state_->next_value].when) + 1, now_ = arrives - 1;
    return written[state_->next_value].value;
  }
  arrives = now_ + 1;
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

uint32_t Thread::atomic(uint64_t at, uint32_t v, order how, int site, uint32_t (*change)(uint32_t, uint32_t), Where w) {
  unsigned* p = reinterpret_cast<unsigned*>(at);
  const bool releases = how == order::release || how == order::acq_rel;
  if (releases) fence(w);
  simt::note_atomic(p, simt::Access::write, w);
  note(site, at);
  simt::Quiet quiet;
  if (state_->fenced != nullptr) state_->launch.order.release(at, *state_->fenced);
  state_->launch.order.acquire(at, how == order::acquire || how == order::acq_rel ? state_->known : state_->seen);
  uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, change(old, v), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  if (state_->warp != nullptr) {
    auto& written = state_->launch.counting->atomics[at];
    if (written.empty()) written.push_back({old, 0});
    // The memory takes them in turn, but none waits for the one before it to return.
    arrives = std::max(now_ + 1, written.back().when);
    state_->next_value = written.size();
    written.push_back({change(old, v), arrives});
  }
  return old;
}

// ---- blocks and warps ----------------------------------------------------------------------------------------------

uint32_t Thread::bar_red(bool vote, int site, Where w) {
  uint32_t* latest = nullptr;
  {
    simt::Quiet quiet;
    if (state_->warp != nullptr) {
      latest = &state_->launch.counting->barriers[ctaid()][state_->barriers & 1];
      *latest = std::max(*latest, now_);
      auto& sites = state_->launch.counting->barrier_sites[ctaid()];
      if (sites.size() <= state_->barriers) sites.push_back(site);
    }
    if (!state_->known.empty()) state_->launch.order.arrive(ctaid(), state_->known);
    // A fence before the barrier does not make a release of an atomic operation after it.
    state_->fenced = nullptr, state_->seen.forget(), state_->known.forget();
  }
  ++state_->barriers, state_->polled = -1;
  const uint32_t votes = simt::sync_block(vote, w);
  simt::Quiet quiet;
  state_->launch.order.passed(ctaid(), state_->barriers);
  if (latest != nullptr) now_ = *latest;
  return votes;
}

std::pair<uint32_t, bool> Thread::shfl(shuffle how, uint32_t a, uint32_t b, uint32_t c, uint32_t mask, Where w) {
  const int lane = int(laneid()), clamp = int(c & 31), segment = int(c >> 8 & 31), by = int(b & 31);
  const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
  int from = lane - by;
  if (how == shuffle::bfly) from = lane ^ by;
  if (how == shuffle::down) from = lane + by;
  if (how == shuffle::idx) from = least | (by & ~segment);
  const bool inside = how == shuffle::up ? from >= most : from <= most;
  if (!inside) from = lane;
  uint32_t* latest = nullptr;
  if (state_->warp != nullptr)
    latest = &state_->warp->latest[state_->shuffles++ & 1], *latest = std::max(*latest, now_);
  const uint32_t got = uint32_t(simt::shuffle("shfl.sync", mask, a, from, w));
  if (latest != nullptr) now_ = *latest;
  return {got, inside};
}

void Thread::warp_sync(unsigned mask, Where w) {
  simt::Quiet quiet;
  state_->launch.order.arrive_in_warp(ctaid(), tid(), state_->known);
  simt::meet("bar.warp.sync", mask, w, true, [](simt::Fiber*, simt::Fiber&) {});
  state_->launch.order.passed_in_warp(ctaid(), tid(), state_->known);
}

uint32_t Thread::ballot(uint32_t mask, bool vote, Where w) { return simt::ballot(mask, vote, w); }

// ---- counting ------------------------------------------------------------------------------------------------------

void Thread::block(int b) {
  if (state_->warp == nullptr) return;
  simt::Quiet quiet;
  const Block& of = state_->launch.entry.blocks[b];
  if (of.header >= 0) {
    const auto& latches = state_->launch.entry.loops[of.header].latches;
    const bool again = std::find(latches.begin(), latches.end(), state_->last_block) != latches.end();
    state_->iterations[size_t(of.header)] = again ? state_->iterations[size_t(of.header)] + 1 : 0;
  }
  state_->last_block = b;
  state_->key = 1;
  for (int loop : of.loops) state_->key = mixed(state_->key, state_->iterations[size_t(loop)]);
  auto& [which, lanes] = state_->warp->blocks[mixed(state_->key, uint64_t(b))];
  if (lanes == 0) {
    auto& phases = state_->warp->phases;
    phases.resize(std::max(phases.size(), size_t(state_->barriers + 1)));
    for (unsigned n : of.counts) phases[state_->barriers] += n;
  }
  which = b, lanes |= 1u << laneid();
}

void Thread::note(int site, uint64_t at) {
  state_->polled = -1;
  if (state_->warp == nullptr) return;
  simt::Quiet quiet;
  auto& access = state_->warp->accesses[mixed(state_->key, uint64_t(site) << 32)];
  access.site = site, access.mask |= 1u << laneid(), access.address[laneid()] = at;
}

}  // namespace ptx
