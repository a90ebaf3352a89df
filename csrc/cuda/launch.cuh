// In: a Plan and a dtype. Out: a call with the types that kernels are templates of; and what the .cu files offer to
// backend.cu.
#pragma once

#include "../core/dispatch.h"
#include "../core/problem.h"
#include "reduce.cuh"

namespace fastbn::cuda {

// body(Type<T>, Type<Walk>, integral_constant<int, V>)
template <class Body>
void dispatch(const Plan& plan, DType dtype, const Body& body) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int full = full_vector<T>;
    using One = std::integral_constant<int, 1>;
    using Full = std::integral_constant<int, full>;
    if (plan.walk == Walk::rows) {
      plan.vector == 1 ? body(type, Type<RowsWalk<T, 1, int64_t>>{}, One{})
                       : body(type, Type<RowsWalk<T, full, int64_t>>{}, Full{});
    } else {
      plan.vector == 1 ? body(type, Type<ColumnsWalk<T, 1, int64_t>>{}, One{})
                       : body(type, Type<ColumnsWalk<T, full, int64_t>>{}, Full{});
    }
  });
}

// body(Type<T>, Type<Walk>) for plans of the resident strategy, which take whole vectors.
template <class Body>
void dispatch_full(const Plan& plan, DType dtype, const Body& body) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    plan.walk == Walk::rows ? body(type, Type<RowsWalk<T, full_vector<T>, int>>{})
                            : body(type, Type<ColumnsWalk<T, full_vector<T>, int>>{});
  });
}

// streaming
void launch_stats(const Plan& plan, const Forward& args, const Stream& stream);
void launch_apply(const Plan& plan, const Forward& args, const Stream& stream);
void launch_grad_stats(const Plan& plan, const Backward& args, const Stream& stream);
void launch_grad_apply(const Plan& plan, const Backward& args, const Stream& stream);
// resident
void launch_resident(const Plan& plan, const Forward& args, const Stream& stream);
void launch_grad_resident(const Plan& plan, const Backward& args, const Stream& stream);
// Blocks of the kernel that would be launched that one multiprocessor of the current device holds at a time.
int64_t resident_blocks_of(const Plan& plan, const Forward& args);
int64_t grad_resident_blocks_of(const Plan& plan, const Backward& args);

// The counters of a launch: those that count the blocks of an item that are done, behind those of barriers.
inline unsigned* tickets(const Stream& stream) {
  return stream.counters + counter_bytes / 2 / int64_t(sizeof(unsigned));
}

// Where a streaming backward pass keeps the sums [C] between its two launches; nullptr in eval, which needs none.
Sums* sums_of(const Plan& plan, const Backward& args);

}  // namespace fastbn::cuda
