// Dispatch from a run-time dtype to a template argument: the only place that does so.
#pragma once

#include "moments.h"
#include "problem.h"
#include "scalar.h"

namespace fastbn {

#include "activation.h"

template <class T>
struct Type {
  using type = T;
};

// Calls body with Type<float>{}, Type<double>{}, Type<Half>{} or Type<BFloat16>{}.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // body runs where the caller runs
#endif
template <class Body>
FASTBN_HD auto dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f64:
      return body(Type<double>{});
    case DType::f16:
      return body(Type<Half>{});
    case DType::bf16:
      return body(Type<BFloat16>{});
    default:
      return body(Type<float>{});
  }
}

FASTBN_HD double read(const Param& p, int64_t i, double absent) {
  if (p.data == nullptr) return absent;
  return dispatch_dtype(
      p.dtype, [&](auto t) { return double(to_acc(static_cast<const typename decltype(t)::type*>(p.data)[i])); });
}

FASTBN_HD void write(const Output& p, int64_t i, double value) {
  if (p.data == nullptr) return;
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    static_cast<T*>(p.data)[i] = from_acc<T>(acc_t<T>(value));
  });
}

// Updates one channel of the running statistics with the mean and biased variance of `count` values. Channel 0 also
// increments the batch counter.
FASTBN_HD void update(const Running& running, int64_t i, double mean, double var, double count) {
  if (running.mean.data == nullptr) return;
  if (i == 0 && running.counter != nullptr) ++*running.counter;
  const double momentum = running.batches == nullptr ? running.momentum : 1.0 / double(*running.batches);
  const auto blend = [&](const Output& p, double batch) {
    write(p, i, (1 - momentum) * read({p.data, p.dtype}, i, 0) + momentum * batch);
  };
  blend(running.mean, mean);
  blend(running.var, var * (count / (count - 1)));
}

// Merges one channel of the BatchStats of K ranks, [K, 3, C], into batch_stats [3, C] and updates the running
// statistics, which stay as they are if there are fewer than two values.
FASTBN_HD void gather_stats(const double* all_stats, int64_t K, int64_t C, int64_t channel, double* batch_stats,
                            const Running& running) {
  const Moments all = merged(K, C, [=](int64_t k) { return all_stats + k * 3 * C + channel; });
  const double variance = all.n == 0 ? 0 : all.m2 / all.n;
  batch_stats[channel] = all.mean, batch_stats[C + channel] = variance, batch_stats[2 * C + channel] = all.n;
  if (all.n > 1) update(running, channel, all.mean, variance, all.n);
}

}  // namespace fastbn
