// Dispatch from a plan and dtype to template arguments, and the launches that backend.cu uses.
#pragma once

#include "../core/dispatch.h"
#include "../core/problem.h"
#include "backend.h"
#include "reduce.cuh"

namespace fastbn::cuda {

// Calls body(Type<T>, Type<Access>, integral_constant<int, V>).
template <class Body>
void dispatch(const Plan& plan, DType dtype, const Body& body) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int full = full_vector<T>;
    using One = std::integral_constant<int, 1>;
    using Full = std::integral_constant<int, full>;
    if (plan.pattern == AccessPattern::rows) {
      plan.vector == 1 ? body(type, Type<RowAccess<T, 1, int64_t>>{}, One{})
                       : body(type, Type<RowAccess<T, full, int64_t>>{}, Full{});
    } else {
      plan.vector == 1 ? body(type, Type<ColumnAccess<T, 1, int64_t>>{}, One{})
                       : body(type, Type<ColumnAccess<T, full, int64_t>>{}, Full{});
    }
  });
}

// Calls body(Type<T>, Type<Access>) for plans of the resident strategy, which use whole vectors.
template <class Body>
void dispatch_full(const Plan& plan, DType dtype, const Body& body) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    plan.pattern == AccessPattern::rows ? body(type, Type<RowAccess<T, full_vector<T>, int>>{})
                                        : body(type, Type<ColumnAccess<T, full_vector<T>, int>>{});
  });
}

// streaming
void launch_stats(const Plan& plan, const Forward& args, const Stream& stream);
void launch_normalize(const Plan& plan, const Forward& args, const Stream& stream);
void launch_backward_reduce(const Plan& plan, const Backward& args, const Stream& stream);
void launch_backward_elemt(const Plan& plan, const Backward& args, const Stream& stream);
// resident
void launch_resident(const Plan& plan, const Forward& args, const Stream& stream);
void launch_backward_resident(const Plan& plan, const Backward& args, const Stream& stream);
// How many blocks of the kernel for these arguments fit on one multiprocessor of the current device.
int64_t resident_blocks_of(const Plan& plan, const Forward& args);
int64_t backward_resident_blocks_of(const Plan& plan, const Backward& args);

// Counters of finished blocks of a channel tile; they follow those of the barriers.
inline unsigned* tickets(const Stream& stream) {
  return stream.counters + counter_bytes / 2 / int64_t(sizeof(unsigned));
}

// Where a streaming backward pass keeps the sums [C] between its two launches; nullptr in eval.
Sums* sums_of(const Plan& plan, const Backward& args);

}  // namespace fastbn::cuda
