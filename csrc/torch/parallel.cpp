// Implements cpu/parallel.h with the thread pool of torch, so that torch.set_num_threads applies.
#include "../cpu/parallel.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

namespace fastbn::cpu {

int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run_parallel(int64_t items, bool worth_it, Order order, Run run, const void* body) {
  const auto nth = [order](int64_t begin, int64_t end, int64_t i) {
    return order == Order::forwards ? begin + i : end - 1 - i;
  };
  const int64_t threads = worth_it ? smaller(thread_count(), items) : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) run(body, nth(0, items, i));
    return;
  }
  // Each thread starts with its own share: what it read or wrote is in its cache, while the cache of another die is
  // four times slower (45 instead of 190 GB/s), and a hardware prefetcher that runs past an item would take lines from
  // the thread that writes the next one (7x7 and 14x14 maps: 15-40 % faster, NOTES.md#threads).
  struct alignas(64) Share {
    std::atomic<int64_t> taken{0};
  };
  std::vector<Share> shares(threads);
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t share = (own + k) % threads;
      const int64_t begin = items * share / threads, end = items * (share + 1) / threads;
      for (int64_t i; (i = shares[share].taken.fetch_add(1, std::memory_order_relaxed)) < end - begin;) {
        run(body, nth(begin, end, i));
      }
    }
  });
}

}  // namespace fastbn::cpu
