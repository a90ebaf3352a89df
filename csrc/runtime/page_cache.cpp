// A list of mapped blocks under one lock. No system call and no allocation is made while the lock is held, so that
// nobody, above all a process that forks, waits for it for more than a microsecond.
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
// The default limit of what is kept.
constexpr int64_t standard_limit = 256'000'000;
constexpr int64_t part_of_memory = 32;
// Touching fresh memory costs at most 0.45 ms per MB (see min_bytes): 0.12 s for standard_limit, 2 % of this time.
constexpr auto idle_time = std::chrono::seconds(5);
constexpr auto between_rounds = std::chrono::seconds(1);  // of return_idle_blocks

struct Block {
  char* data;
  int64_t bytes;
  Clock::time_point since;  // when it was released
};

// No destructor: tensors may be freed after the static objects of this library are gone.
struct Cache {
  // More than the outputs and workspaces of a network: ResNet-152 has 155 batch norms.
  static constexpr int most_blocks = 1024;

  std::mutex mutex;
  Block blocks[most_blocks];  // oldest first
  int count = 0;
  int64_t limit = 0;
  int64_t kept = 0, used = 0;  // bytes in the list, and bytes that are acquired
  int64_t peak = 0;            // of `used`; decays by a sixteenth in each round
  bool has_thread = false;

  Block remove(int i) {
    const Block block = blocks[i];
    std::memmove(blocks + i, blocks + i + 1, size_t(count - i - 1) * sizeof(Block));
    --count;
    kept -= block.bytes;
    return block;
  }

  // A larger limit is used only up to what a training step has in use at once, and a quarter more: images of many sizes
  // would otherwise leave blocks of each size behind.
  int64_t bound() const { return smaller(limit, larger(standard_limit, peak + peak / 4)); }
};
Cache cache;
using Lock = std::lock_guard<std::mutex>;

// Unmaps the oldest block if `is_due`, which is evaluated under the lock; false if not.
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

// Unmaps idle blocks even if fastbn is not called again. The thread ends when nothing is kept; the next block that is
// kept starts another one.
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

// If no thread can be created, blocks stay until others need their place.
void start_thread() {
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  // Signals belong to the threads of the program.
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

// Rounds up to an eighth of a power of two, so that images of any height and width need few sizes. The excess is never
// touched.
int64_t size_of_block(int64_t bytes) {
  const int64_t power = int64_t(1) << (63 - __builtin_clzll(uint64_t(bytes)));
  return round_up(bytes, larger(power / 8, small_page));
}

char* map_anywhere(int64_t bytes) {
  void* const mapped = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
}

// Maps a block for `bytes`, aligned to huge pages if it has any.
char* map_block(int64_t block, int64_t bytes) {
  if (block < huge_page) return map_anywhere(block);
  char* const start = map_anywhere(block + huge_page);
  if (start == nullptr) return nullptr;
  const int64_t head = (huge_page - int64_t(reinterpret_cast<uintptr_t>(start) % huge_page)) % huge_page;
  if (head > 0) munmap(start, size_t(head));
  munmap(start + head + block, size_t(huge_page - head));
#if defined(MADV_HUGEPAGE)
  // Whole huge pages only: a partial one would use memory that was not asked for.
  madvise(start + head, size_t(bytes / huge_page * huge_page), MADV_HUGEPAGE);
#endif
  return start + head;
}

// The newest block of this size, which is most likely in cache.
char* take_kept(int64_t size) {
  const Lock lock(cache.mutex);
  for (int i = cache.count - 1; i >= 0; --i) {
    if (cache.blocks[i].bytes == size) return cache.remove(i).data;
  }
  return nullptr;
}

// False if there is no room.
bool keep(const Block& block, bool& starts_thread) {
  const Lock lock(cache.mutex);
  if (cache.kept + block.bytes > cache.bound() || cache.count == Cache::most_blocks) return false;
  cache.blocks[cache.count++] = block;
  cache.kept += block.bytes;
  starts_thread = !cache.has_thread;
  cache.has_thread = true;
  return true;
}

// A child process has only the thread that forked, and starts with an empty list.
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
    // A block larger than the bound does not evict others.
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
