// In: a number of independent items. Out: all of them done, on torch's own threads.
// parallel.cpp is the one file that names a threading backend.
#pragma once

#include "../core/platform.h"

namespace fastbn::cpu {

// How many threads parallel_for uses here and now, for work that is worth it.
int64_t thread_count();

enum class Order : bool { forwards, backwards };

// What is left for a thread to take.
class Items {
 public:
  struct Share;
  Items(int64_t items, Order order, Share* shares, int64_t threads, int64_t thread)
      : items_(items), order_(order), shares_(shares), threads_(threads), thread_(thread) {}

  // The next one; -1: there are no more.
  int64_t next();

 private:
  const int64_t items_;
  const Order order_;
  Share* const shares_;
  const int64_t threads_, thread_;
  int64_t done_ = 0;  // shares that are empty
};

using Run = void (*)(const void* body, Items& items);
void run_parallel(int64_t items, int64_t traffic_bytes, Order order, Run run, const void* body);

// Calls body(i) for every 0 <= i < items. Each thread has a share of neighbouring items, the same one for the same
// number of items, and goes through it in `order`; one that is done takes from the others' shares, so body must not
// depend on who runs it.
template <class Body>
void parallel_for(int64_t items, int64_t traffic_bytes, const Body& body, Order order = Order::forwards) {
  const Run run = [](const void* f, Items& items) {
    for (int64_t i; (i = items.next()) >= 0;) (*static_cast<const Body*>(f))(i);
  };
  run_parallel(items, traffic_bytes, order, run, &body);
}

// Calls first(i) for every item, and then(i) once the same thread has called first for `lag` more, or no more is left.
template <class First, class Then>
void parallel_for(int64_t items, int64_t traffic_bytes, int64_t lag, const First& first, const Then& then) {
  struct Both {
    const First& first;
    const Then& then;
    int64_t lag;
  };
  const Run run = [](const void* f, Items& items) {
    const Both& both = *static_cast<const Both*>(f);
    constexpr int64_t most = 16;
    int64_t waiting[most], taken = 0, finished = 0;
    for (int64_t i; (i = items.next()) >= 0;) {
      both.first(i);
      waiting[taken++ % most] = i;
      if (taken - finished > smaller(both.lag, most - 1)) both.then(waiting[finished++ % most]);
    }
    while (finished < taken) both.then(waiting[finished++ % most]);
  };
  const Both both{first, then, lag};
  run_parallel(items, traffic_bytes, Order::forwards, run, &both);
}

}  // namespace fastbn::cpu
