// In: dtypes and activations known at run time. Out: a call with the type as a template argument; the only such place.
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

// body is called with Type<float>{}, Type<double>{}, Type<Half>{} or Type<BFloat16>{}.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the body is of the side that calls
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

// One channel of the running statistics, from the mean and biased variance of `count` values. The first one counts the
// batch.
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

// One channel of packets [K, 3, C] becomes one of a packet [3, C], and of the running statistics; those stay what they
// are where there is no variance to speak of.
FASTBN_HD void finish(const double* packets, int64_t K, int64_t C, int64_t channel, double* packet,
                      const Running& running) {
  const Moments all = merged(K, C, [=](int64_t k) { return packets + k * 3 * C + channel; });
  const double variance = all.n == 0 ? 0 : all.m2 / all.n;
  packet[channel] = all.mean, packet[C + channel] = variance, packet[2 * C + channel] = all.n;
  if (all.n > 1) update(running, channel, all.mean, variance, all.n);
}

}  // namespace fastbn
