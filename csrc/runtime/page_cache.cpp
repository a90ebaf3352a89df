// A list of mapped blocks behind one lock. No system call and no allocation is made while the lock is held, so that
// whoever waits for it, a process that forks above all, waits for less than a microsecond.
#include "page_cache.h"

#include <pthread.h>
#include <sys/mman.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "memory_limit.h"

namespace fastbn::page_cache {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t small_page = 4 << 10;
constexpr int64_t huge_page = 2 << 20;
// Kept at most, unless FASTBN_CPU_CACHE_MB says otherwise.
constexpr int64_t standard_limit = 256'000'000;
constexpr int64_t part_of_memory = 32;
// To touch fresh memory costs at most 0.45 ms a MB (see min_bytes): 0.12 s for all of standard_limit, 2 % of
// this time.
constexpr auto idle_time = std::chrono::seconds(5);
constexpr auto between_rounds = std::chrono::seconds(1);  // of the thread that looks for idle blocks

struct Block {
  char* data;
  int64_t bytes;
  Clock::time_point since;  // it was freed
};

// Has no destructor: tensors may be freed after the static objects of this library are gone.
struct Cache {
  // More than a network has outputs and workspaces: ResNet-152 has 155 batch norms.
  static constexpr int most_blocks = 1024;

  std::mutex mutex;
  Block blocks[most_blocks];  // the one that has waited longest first
  int count = 0;
  int64_t limit = 0;
  int64_t kept = 0, used = 0;  // bytes of blocks, and of those that somebody has taken
  int64_t peak = 0;            // of `used`, a sixteenth less with each round of the thread
  bool has_thread = false;

  Block remove(int i) {
    const Block block = blocks[i];
    std::memmove(blocks + i, blocks + i + 1, size_t(count - i - 1) * sizeof(Block));
    --count;
    kept -= block.bytes;
    return block;
  }

  // Of a limit beyond the standard one only what a step of a training takes at once, and a quarter more, because its
  // sizes do not all take turns: images of many sizes would otherwise leave blocks of each size behind.
  int64_t bound() const { return smaller(limit, larger(standard_limit, peak + peak / 4)); }
};
Cache cache;
using Lock = std::lock_guard<std::mutex>;

// Takes the oldest block out of the list and unmaps it, if `is_due`, which is asked under the lock. False if not.
template <class IsDue>
bool unmap_oldest_if(const IsDue& is_due) {
  Block oldest;
  {
    const Lock lock(cache.mutex);
    if (cache.count == 0 || !is_due(cache.blocks[0])) return false;
    oldest = cache.remove(0);
  }
  munmap(oldest.data, size_t(oldest.bytes));
  return true;
}

// A thread that gives idle blocks back, also where no call of fastbn follows. It ends when nothing is kept any more;
// the next block that is kept starts another one.
void* return_idle_blocks(void*) {
  while (true) {
    std::this_thread::sleep_for(between_rounds);
    const auto now = Clock::now();
    while (unmap_oldest_if([&](const Block& oldest) { return now - oldest.since > idle_time; })) {
    }
    const Lock lock(cache.mutex);
    cache.peak = larger(cache.used, cache.peak - cache.peak / 16);
    cache.has_thread = cache.count > 0;
    if (!cache.has_thread) return nullptr;
  }
}

// Where the system has no thread to give, blocks wait until others need their place.
void start_thread() {
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  const bool started = pthread_create(&thread, &attributes, &return_idle_blocks, nullptr) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  if (started) return;
  const Lock lock(cache.mutex);
  cache.has_thread = false;
}

// To the next eighth of a power of two: images of any height and width need few sizes then, and nearly always find
// pages that are kept. Nobody touches what is beyond the tensor.
int64_t size_of_block(int64_t bytes) {
  const int64_t power = int64_t(1) << (63 - __builtin_clzll(uint64_t(bytes)));
  return round_up(bytes, larger(power / 8, small_page));
}

char* map_anywhere(int64_t bytes) {
  void* const mapped = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
}

// A block for a tensor of so many bytes; at a huge page's address, if it has one.
char* map_block(int64_t block, int64_t bytes) {
  if (block < huge_page) return map_anywhere(block);
  char* const start = map_anywhere(block + huge_page);
  if (start == nullptr) return nullptr;
  const int64_t head = (huge_page - int64_t(reinterpret_cast<uintptr_t>(start) % huge_page)) % huge_page;
  if (head > 0) munmap(start, size_t(head));
  munmap(start + head + block, size_t(huge_page - head));
#if defined(MADV_HUGEPAGE)
  // Whole huge pages only: the rest of a last one would be memory that nobody asked for.
  madvise(start + head, size_t(bytes / huge_page * huge_page), MADV_HUGEPAGE);
#endif
  return start + head;
}

// The newest block of this size, which is the likeliest to be in a cache of the processor.
char* take_kept(int64_t size) {
  const Lock lock(cache.mutex);
  for (int i = cache.count - 1; i >= 0; --i) {
    if (cache.blocks[i].bytes == size) return cache.remove(i).data;
  }
  return nullptr;
}

// False if there is no place for it now.
bool keep(const Block& block, bool& starts_thread) {
  const Lock lock(cache.mutex);
  if (cache.kept + block.bytes > cache.bound() || cache.count == Cache::most_blocks) return false;
  cache.blocks[cache.count++] = block;
  cache.kept += block.bytes;
  starts_thread = !cache.has_thread;
  cache.has_thread = true;
  return true;
}

// A child has only the thread that forked. It begins with an empty list, or it would keep what its parent gives back.
[[maybe_unused]] const int registered = pthread_atfork([] { cache.mutex.lock(); }, [] { cache.mutex.unlock(); },
                                                       [] {
                                                         cache.has_thread = false;
                                                         cache.mutex.unlock();
                                                         trim();
                                                       });

}  // namespace

void open() {
  int64_t limit = smaller(standard_limit, runtime::memory_limit() / part_of_memory);
  if (const char* given = std::getenv("FASTBN_CPU_CACHE_MB"); given != nullptr && *given != 0) {
    char* end = nullptr;
    const long long megabytes = std::strtoll(given, &end, 10);
    if (*end != 0 || megabytes < 0 || megabytes > int64_t(1) << 40) {
      throw std::runtime_error("FASTBN_CPU_CACHE_MB should be a number of megabytes, not '" + std::string(given) + "'");
    }
    limit = int64_t(megabytes) << 20;
  }
  const Lock lock(cache.mutex);
  cache.limit = limit;
}

void* acquire(int64_t bytes) {
  const int64_t size = size_of_block(bytes);
  char* data = take_kept(size);
  if (data == nullptr) data = map_block(size, bytes);
  if (data == nullptr && trim()) data = map_block(size, bytes);
  if (data == nullptr) return nullptr;
  const Lock lock(cache.mutex);
  cache.used += size;
  cache.peak = larger(cache.peak, cache.used);
  return data;
}

void release(void* data, int64_t bytes) {
  const Block block{static_cast<char*>(data), size_of_block(bytes), Clock::now()};
  {
    const Lock lock(cache.mutex);
    cache.used -= block.bytes;
  }
  bool starts_thread = false;
  while (!keep(block, starts_thread)) {
    // A block that would not fit into an empty list need not empty it.
    if (unmap_oldest_if([&](const Block&) { return block.bytes <= cache.bound(); })) continue;
    munmap(block.data, size_t(block.bytes));
    return;
  }
  if (starts_thread) start_thread();
}

bool trim() {
  bool any = false;
  while (unmap_oldest_if([](const Block&) { return true; })) any = true;
  return any;
}

}  // namespace fastbn::page_cache
