// Dispatch from a plan and dtype to template arguments, and the launches that backend.cu uses.
#pragma once

#include "../core/dispatch.h"
#include "../core/problem.h"
#include "backend.h"
#include "merge.cuh"

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
      plan.vector == 1 ? body(type, Type<RowAccess<T, 1, int64_t, true>>{}, One{})
                       : body(type, Type<RowAccess<T, full, int64_t, false>>{}, Full{});
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
    if (plan.pattern == AccessPattern::columns) return body(type, Type<ColumnAccess<T, full_vector<T>, int>>{});
    plan.columns_per_channel % plan.vector == 0 ? body(type, Type<RowAccess<T, full_vector<T>, int, true>>{})
                                                : body(type, Type<RowAccess<T, full_vector<T>, int, false>>{});
  });
}

// streaming
void launch_stats(const Plan& plan, const Forward& args, const Stream& stream);
void launch_normalize(const Plan& plan, const Forward& args, const Stream& stream);
void launch_backward_reduce(const Plan& plan, const Backward& args, const Stream& stream);
void launch_backward_elemt(const Plan& plan, const Backward& args, const Stream& stream);
// resident; false if the blocks do not fit beside each other
bool launch_resident(const Plan& plan, const Forward& args, const Stream& stream);
bool launch_backward_resident(const Plan& plan, const Backward& args, const Stream& stream);
// How many blocks of the kernel for these arguments fit on the current device.
int64_t resident_blocks_of(const Plan& plan, const Forward& args);
int64_t backward_resident_blocks_of(const Plan& plan, const Backward& args);

// How many blocks of a kernel of the resident strategy fit on the current device.
template <class Kernel>
int64_t resident_blocks_with(Kernel* kernel, const Plan& plan) {
  if (plan.cluster > 1) return resident_clusters(kernel, plan.threads, plan.shared_bytes, plan.cluster) * plan.cluster;
  return resident_blocks(kernel, plan.threads, plan.shared_bytes) * plan.multiprocessors;
}

// Launches a kernel of the resident strategy. False if its blocks do not fit beside each other.
template <class Kernel, class Args>
bool launch_group_kernel(Kernel* kernel, const Plan& plan, const Args& args, const Stream& stream) {
  return launch({plan.blocks, plan.threads, plan.shared_bytes, plan.cooperative, stream.handle, plan.cluster}, kernel,
                geometry_of(plan, args.problem.dtype), args, stream.barriers, stream.tickets);
}

// Where a streaming backward pass keeps the sums [C] between its two launches; nullptr in eval.
Sums* sums_of(const Plan& plan, const Backward& args);

}  // namespace fastbn::cuda
