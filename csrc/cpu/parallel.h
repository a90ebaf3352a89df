// In: a number of independent items. Out: all of them done, on torch's own threads.
// parallel.cpp is the one file that names a threading backend.
#pragma once

#include <type_traits>

#include "../core/platform.h"

namespace fastbn::cpu {

void run_parallel(int64_t items, bool worth_it, void (*run)(void* body, int64_t item), void* body);

// Calls body(i) for every 0 <= i < items. Who runs what is decided as threads come free, so body must not
// depend on it. Below worth_bytes of memory traffic in all, waking a second thread costs more than it gives.
template <class Body>
void parallel_for(int64_t items, int64_t traffic_bytes, Body&& body) {
  constexpr int64_t worth_bytes = 128 << 10;
  using Plain = std::remove_reference_t<Body>;
  run_parallel(items, traffic_bytes >= worth_bytes, [](void* f, int64_t i) { (*static_cast<Plain*>(f))(i); }, &body);
}

}  // namespace fastbn::cpu
