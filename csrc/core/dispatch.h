// In: dtypes known at run time. Out: a call with the type as a template argument; the only such place.
#pragma once

#include "problem.h"
#include "scalar.h"

namespace fastbn {

template <class T>
struct Type {
  using type = T;
};

// body is called with Type<float>{}, Type<double>{}, Type<Half>{} or Type<BFloat16>{}.
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

}  // namespace fastbn
