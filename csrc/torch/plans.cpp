// Descriptions of plans for Python.
#include "plans.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../cuda/query.h"
#include "arguments.h"
#include "context.h"

namespace py = pybind11;

namespace fastbn {

namespace {

Problem problem_of(const std::vector<int64_t>& sizes, bool channels_last, int64_t element_bytes) {
  TORCH_CHECK_INDEX(sizes.size() >= 2, "sizes should have at least 2 entries (N, C, ...), not ", sizes.size());
  TORCH_CHECK_VALUE(element_bytes == 2 || element_bytes == 4 || element_bytes == 8,
                    "element_bytes should be 2, 4 or 8, not ", element_bytes);
  int64_t positions = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    TORCH_CHECK_VALUE(sizes[i] > 0, "sizes should be positive, not ", sizes[i]);
    if (i >= 2) TORCH_CHECK_VALUE(!__builtin_mul_overflow(positions, sizes[i], &positions), "sizes are too large");
  }
  int64_t elements;
  TORCH_CHECK_VALUE(!__builtin_mul_overflow(positions, sizes[0], &elements) &&
                        !__builtin_mul_overflow(elements, sizes[1], &elements) &&
                        !__builtin_mul_overflow(elements, int64_t(8), &elements),
                    "sizes are too large");
  const DType dtype = element_bytes == 8 ? DType::f64 : element_bytes == 4 ? DType::f32 : DType::bf16;
  return {{sizes[0], sizes[1], positions, channels_last ? Layout::channels_last : Layout::channels_first}, dtype};
}

py::dict plan(const std::vector<int64_t>& sizes, bool channels_last, int64_t element_bytes) {
  const Problem problem = problem_of(sizes, channels_last, element_bytes);
  const cpu::Plan p = cpu::plan(problem);
  py::dict d;
  d["access_pattern"] = p.pattern == cpu::AccessPattern::rows ? "rows" : "columns";
  d["channel_tiles"] = p.channel_tiles;
  d["channels_per_tile"] = p.channels_per_tile;
  d["batch_splits"] = p.batch_splits;
  d["workspace_bytes"] = p.workspace_bytes;
  return d;
}

// The fields of a device and of a plan, by their names in Python.
#define FASTBN_FIELD(type, name) {#name, &cuda::type::name}
constexpr std::pair<const char*, int64_t cuda::Device::*> device_fields[] = {
    FASTBN_FIELD(Device, multiprocessors),
    FASTBN_FIELD(Device, shared_per_multiprocessor),
    FASTBN_FIELD(Device, shared_per_block),
    FASTBN_FIELD(Device, shared_reserved),
    FASTBN_FIELD(Device, registers_per_multiprocessor),
    FASTBN_FIELD(Device, threads_per_multiprocessor),
    FASTBN_FIELD(Device, bytes_per_microsecond),
    FASTBN_FIELD(Device, cluster),
};
constexpr std::pair<const char*, int64_t cuda::Plan::*> plan_fields[] = {
    FASTBN_FIELD(Plan, vector),
    FASTBN_FIELD(Plan, threads),
    FASTBN_FIELD(Plan, rows),
    FASTBN_FIELD(Plan, columns),
    FASTBN_FIELD(Plan, columns_per_channel),
    FASTBN_FIELD(Plan, channel_tiles),
    FASTBN_FIELD(Plan, channels_per_tile),
    FASTBN_FIELD(Plan, vectors_per_row),
    FASTBN_FIELD(Plan, lanes_per_row),
    FASTBN_FIELD(Plan, batch_splits),
    FASTBN_FIELD(Plan, subgroup),
    FASTBN_FIELD(Plan, cluster),
    FASTBN_FIELD(Plan, groups),
    FASTBN_FIELD(Plan, waves),
    FASTBN_FIELD(Plan, blocks),
    FASTBN_FIELD(Plan, shared_bytes),
    FASTBN_FIELD(Plan, scratch_bytes),
    FASTBN_FIELD(Plan, slice_bytes),
    FASTBN_FIELD(Plan, stagger),
    FASTBN_FIELD(Plan, barriers),
    FASTBN_FIELD(Plan, tickets),
    FASTBN_FIELD(Plan, workspace_bytes),
    FASTBN_FIELD(Plan, bytes),
    FASTBN_FIELD(Plan, least_bytes),
};
#undef FASTBN_FIELD

cuda::Device device_of(const py::dict& numbers) {
  cuda::Device device{};
  for (const auto& [name, member] : device_fields) {
    TORCH_CHECK_VALUE(numbers.contains(name), "device should have the entry '", name, "'");
    device.*member = numbers[name].cast<int64_t>();
    TORCH_CHECK_VALUE(device.*member >= 0, "device['", name, "'] should not be negative, but is ", device.*member);
  }
  TORCH_CHECK_VALUE(device.multiprocessors > 0, "device['multiprocessors'] should be positive");
  TORCH_CHECK_VALUE(numbers.contains("cooperative"), "device should have the entry 'cooperative'");
  device.cooperative = numbers["cooperative"].cast<bool>();
  return device;
}

py::dict cuda_plan(const std::vector<int64_t>& sizes, bool channels_last, int64_t element_bytes,
                   const std::string& direction, bool training, bool aligned, const py::dict& device) {
  TORCH_CHECK_VALUE(direction == "forward" || direction == "backward",
                    "direction should be 'forward' or 'backward', not '", direction, "'");
  const cuda::Plan p = cuda::make_plan(problem_of(sizes, channels_last, element_bytes),
                                       direction == "forward" ? cuda::Pass::forward : cuda::Pass::backward, training,
                                       aligned, device_of(device));
  py::dict d;
  d["strategy"] = p.strategy == cuda::Strategy::resident ? "resident" : "streaming";
  d["access_pattern"] = p.pattern == cuda::AccessPattern::rows ? "rows" : "columns";
  d["cooperative"] = p.cooperative;
  for (const auto& [name, member] : plan_fields) d[name] = p.*member;
  return d;
}

#if defined(FASTBN_GPU)
py::dict cuda_device(const Tensor& input) {
  check_device(input);
  const Context context(input);
  TORCH_CHECK_VALUE(context.on_gpu(), "input should be on a GPU, but is on ", input.device());
  const cuda::Device device = cuda::current_numbers();
  py::dict d;
  for (const auto& [name, member] : device_fields) d[name] = device.*member;
  d["cooperative"] = device.cooperative;
  return d;
}
#endif

}  // namespace

void bind_plans(py::module_& m) {
  m.def("plan", &plan, py::arg("sizes"), py::arg("channels_last"), py::arg("element_bytes"));
  m.def("cuda_plan", &cuda_plan, py::arg("sizes"), py::arg("channels_last"), py::arg("element_bytes"),
        py::arg("direction"), py::arg("training"), py::arg("aligned"), py::arg("device"));
#if defined(FASTBN_GPU)
  m.def("cuda_device", &cuda_device, py::arg("input"));
#endif
}

}  // namespace fastbn
