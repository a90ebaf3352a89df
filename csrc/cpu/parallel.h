// A parallel loop over independent items. torch/parallel.cpp implements it with the thread pool of torch.
#pragma once

#include "../core/platform.h"

namespace fastbn::cpu {

// The number of threads that parallel_for uses for enough work.
int64_t thread_count();

enum class Order : bool { forwards, backwards };

using Run = void (*)(const void* body, int64_t item);
void run_parallel(int64_t items, bool worth_it, Order order, Run run, const void* body);

// Calls body(i) for every 0 <= i < items. Each thread starts with a share of neighbouring items, the same one for the
// same number of items, and goes through it in `order`; a thread that is done takes items of others, so body must not
// depend on who runs it. Below worth_bytes of memory traffic one thread runs everything, because waking a second one
// costs more than it gains.
template <class Body>
void parallel_for(int64_t items, int64_t traffic_bytes, const Body& body, Order order = Order::forwards) {
  constexpr int64_t worth_bytes = 128 << 10;
  const Run run = [](const void* f, int64_t i) { (*static_cast<const Body*>(f))(i); };
  run_parallel(items, traffic_bytes >= worth_bytes, order, run, &body);
}

}  // namespace fastbn::cpu
