// In: calls through pages.h. Out: mappings from the system, and a list of those that wait to be used again.
#include "pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace fastbn::cpu {

namespace {

constexpr int64_t small_page = 4 << 10;
constexpr int64_t huge_page = 2 << 20;

struct Block {
  char* data;
  int64_t bytes;
  bool marked;  // as free: the system may take the pages
};

struct Cache {
  std::mutex mutex;
  std::deque<Block> blocks;  // the one that has waited longest first
  int64_t bytes = 0;
  int64_t limit = [] {
    if (const char* megabytes = std::getenv("FASTBN_CPU_CACHE_MB")) return int64_t(std::atoll(megabytes)) << 20;
    return int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 32;
  }();

  // To mark pages interrupts every thread of the process (50 us, a fifth of a batch norm of 6 MB): so not those that
  // were freed last, which are most often taken at once.
  void mark_old() {
#if defined(MADV_FREE)
    int64_t newer = 0;
    for (auto block = blocks.rbegin(); block != blocks.rend() && !block->marked; ++block) {
      newer += block->bytes;
      if (newer > limit / 4) block->marked = madvise(block->data, block->bytes, MADV_FREE) == 0;
    }
#endif
  }
};

// Never destroyed: tensors may be freed after the static objects of this library are gone.
Cache& cache() {
  static Cache* const c = new Cache;
  return *c;
}

// To the next eighth of a power of two: images of any height and width need few sizes then, and nearly always find
// pages that are kept. Nobody touches what is beyond the tensor.
int64_t size_of_block(int64_t bytes) {
  const int64_t power = int64_t(1) << (63 - __builtin_clzll(uint64_t(bytes)));
  return round_up(bytes, larger(power / 8, small_page));
}

char* map_anywhere(int64_t bytes) {
  void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(mapped);
}

// A block for a tensor of so many bytes, at a huge page's address.
char* map_huge(int64_t block, int64_t bytes) {
  char* const start = map_anywhere(block + huge_page);
  const int64_t head = (huge_page - int64_t(reinterpret_cast<uintptr_t>(start) % huge_page)) % huge_page;
  if (head > 0) munmap(start, head);
  munmap(start + head + block, huge_page - head);
#if defined(MADV_HUGEPAGE)
  // Whole huge pages only: the rest of a last one would be memory that nobody asked for.
  madvise(start + head, bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
  return start + head;
}

}  // namespace

void* take_pages(int64_t bytes) {
  const int64_t size = size_of_block(bytes);
  Cache& c = cache();
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    for (auto block = c.blocks.rbegin(); block != c.blocks.rend(); ++block) {
      if (block->bytes != size) continue;
      char* const data = block->data;
      c.bytes -= size;
      c.blocks.erase(std::next(block).base());
      return data;
    }
  }
  return size < huge_page ? map_anywhere(size) : map_huge(size, bytes);
}

void give_pages(void* data, int64_t bytes) {
  const int64_t size = size_of_block(bytes);
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  if (size > c.limit) {
    munmap(data, size);
    return;
  }
  c.blocks.push_back({static_cast<char*>(data), size, false});
  c.bytes += size;
  c.mark_old();
  for (; c.bytes > c.limit; c.blocks.pop_front()) {
    munmap(c.blocks.front().data, c.blocks.front().bytes);
    c.bytes -= c.blocks.front().bytes;
  }
}

}  // namespace fastbn::cpu
