// In: items from parallel.h. Out: calls on the threads of torch's pool, as many as torch.set_num_threads says.
#include "parallel.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

namespace fastbn::cpu {

int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// What a thread has read or written is in its cache, and what another one has may be four times as far: on processors of
// several third-level caches 45 GB/s instead of 190. And a prefetcher that runs past the end of an item would take lines
// away from the thread that writes the next (7x7 and 14x14 maps on two threads: 0.6 to 0.85 of the time).
struct alignas(64) Items::Share {
  std::atomic<int64_t> taken{0};
};

int64_t Items::next() {
  for (; done_ < threads_; ++done_) {
    const int64_t share = (thread_ + done_) % threads_;
    const int64_t begin = items_ * share / threads_, end = items_ * (share + 1) / threads_;
    const int64_t i = begin + shares_[share].taken.fetch_add(1, std::memory_order_relaxed);
    if (i < end) return order_ == Order::forwards ? i : end - 1 - (i - begin);
  }
  return -1;
}

void run_parallel(int64_t items, int64_t traffic_bytes, Order order, Run run, const void* body) {
  // Below that, waking a second thread costs more than it gives.
  constexpr int64_t worth_bytes = 128 << 10;
  const int64_t threads = traffic_bytes >= worth_bytes ? smaller(thread_count(), items) : 1;
  if (threads <= 1) {
    Items::Share all;
    Items left(items, order, &all, 1, 0);
    run(body, left);
    return;
  }
  std::vector<Items::Share> shares(threads);
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    Items left(items, order, shares.data(), threads, own);
    run(body, left);
  });
}

}  // namespace fastbn::cpu
