// In: Python objects. Out: calls of ops.cpp and autograd.cpp; the module fastbn._C and the operators
// fastbn::*.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <string>

#include "autograd.h"
#include "context.h"
#include "core/backend.h"
#include "cpu/exchange.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "cuda/query.h"

namespace py = pybind11;

#if defined(FASTBN_SIMT)
void bind_simulator(py::module_& m);  // tests/simt/bindings.cpp
#endif

namespace {

using namespace fastbn;

// Subclasses of Tensor may want to see the call; Parameter is the one that never does.
bool is_tensor_or_parameter(py::handle object) {
  static const PyObject* const parameter =
      py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  return THPVariable_CheckExact(object.ptr()) || reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == parameter;
}

// A tensor argument of the short way; `ok` turns false where the long way must be taken.
OptionalTensor plain(py::handle object, bool& ok) {
  if (object.is_none()) return std::nullopt;
  if (!is_tensor_or_parameter(object)) {
    ok = false;
    return std::nullopt;
  }
  const Tensor& t = THPVariable_Unpack(object.ptr());
  ok = ok && is_plain(t);
  return t;
}

// Numbers that need no closer look: what else torch takes for one, Python converts.
double number(py::handle object, bool& ok) {
  ok = ok && (PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr()));
  if (!ok) return 0;
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::string_view text(py::handle object) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (data == nullptr) throw py::error_already_set();
  return {data, size_t(size)};
}

// A call as modules make it, if nothing but tensors and numbers is in it, and nobody watches.
struct Call {
  bool ok, train;
  OptionalTensor x, w, b, mean, var, counter, residual;
  std::optional<Ending> end;
  std::optional<double> momentum;
  double eps;

  Call(py::handle input, py::handle weight, py::handle bias, py::handle running_mean, py::handle running_var,
       py::handle num_batches_tracked, py::handle training, py::handle factor, py::handle epsilon,
       py::handle activation, py::handle activation_param, py::handle added) {
    ok = !input.is_none() && PyBool_Check(training.ptr()) && !is_watched() && !at::impl::torch_function_mode_enabled();
    x = plain(input, ok), w = plain(weight, ok), b = plain(bias, ok);
    mean = plain(running_mean, ok), var = plain(running_var, ok), counter = plain(num_batches_tracked, ok);
    residual = plain(added, ok);
    const std::optional<double> param =
        activation_param.is_none() ? std::nullopt : std::optional(number(activation_param, ok));
    if (ok && PyUnicode_Check(activation.ptr())) end = ending(text(activation), param, residual);
    momentum = factor.is_none() ? std::nullopt : std::optional(number(factor, ok));
    eps = number(epsilon, ok);
    train = training.ptr() == Py_True;
    ok = ok && end && is_ordinary(*x, w, b, mean, var, counter, train, eps, residual);
  }

  template <class Body>
  py::object run(const Body& body) const {
    Tensor output;
    {
      py::gil_scoped_release release;
      output = body();
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
  }
  py::object run(const std::shared_ptr<cpu::Exchange>& exchange = nullptr) const {
    return run([&] { return batch_norm(*x, w, b, mean, var, counter, train, momentum, eps, *end, exchange); });
  }

  static py::object refused() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }
};

py::object eager_batch_norm(py::handle input, py::handle weight, py::handle bias, py::handle running_mean,
                            py::handle running_var, py::handle num_batches_tracked, py::handle training,
                            py::handle momentum, py::handle eps, py::handle activation, py::handle activation_param,
                            py::handle residual) {
  const Call call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                  activation, activation_param, residual);
  return call.ok ? call.run() : call.refused();
}

py::object eager_ghost_batch_norm(py::handle input, py::handle weight, py::handle bias, py::handle running_mean,
                                  py::handle running_var, py::handle num_batches_tracked, py::handle momentum,
                                  py::handle eps, int64_t virtual_batch_size) {
  const Call call(input, weight, bias, running_mean, running_var, num_batches_tracked, py::bool_(true), momentum, eps,
                  py::str("identity"), py::none(), py::none());
  if (!call.ok || virtual_batch_size < 1) return call.refused();
  if (virtual_batch_size == 1 && call.x->numel() == call.x->size(0) * call.x->size(1)) return call.refused();
  return call.run([&] {
    const Statistics statistics{call.mean, call.var, call.counter, call.momentum};
    return ghost_batch_norm(*call.x, call.w, call.b, statistics, virtual_batch_size, call.eps);
  });
}

// As the raw functions and the operators take it.
Ending checked_ending(std::string_view activation, std::optional<double> param, const OptionalTensor& residual) {
  if (const auto end = ending(activation, param, residual)) return *end;
  TORCH_CHECK_VALUE(!ending(activation, std::nullopt, residual), "activation_param should be None for ", activation,
                    ", which has none, not ", param.value_or(0));
  std::string names;
  for (const auto& [name, _] : activations()) names += (names.empty() ? "" : ", ") + std::string(name);
  TORCH_CHECK_VALUE(false, "activation should be one of ", names, ", not '", activation, "'");
}

std::string_view name_of(const Ending& end) { return activations()[size_t(end.activation)].first; }
// The parameter as a caller may give it: None for activations that have none.
std::optional<double> param_of(const Ending& end) {
  const double standard = activations()[size_t(end.activation)].second;
  return standard == standard ? std::optional(end.param) : std::nullopt;
}

std::array<OptionalTensor, 4> optional(const Gradients& grads) {
  std::array<OptionalTensor, 4> result;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].defined()) result[i] = grads[i];
  }
  return result;
}

// function: of the backward pass; of_ranks: the same with an Exchange as its last argument.
void set_python_backward(py::function function, py::function of_ranks) {
  // Never destroyed: at exit the interpreter may be gone before this library.
  auto* kept = new std::pair(std::move(function), std::move(of_ranks));
  set_differentiable_backward([kept](const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                     const OptionalTensor& b, const Tensor& moments, double eps, bool training,
                                     std::array<bool, 4> wanted, const Ending& end,
                                     const std::shared_ptr<cpu::Exchange>& exchange) {
    py::gil_scoped_acquire gil;
    const py::tuple arguments =
        py::make_tuple(dy, x, w, moments, eps, training, wanted, name_of(end), param_of(end), b, end.residual);
    const py::object result =
        exchange == nullptr ? kept->first(*arguments) : kept->second(*arguments, py::cast(exchange));
    const auto found = result.cast<std::array<OptionalTensor, 4>>();
    Gradients grads;
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = found[i].value_or(Tensor());
    return grads;
  });
}

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
  const cpu::Plan p = cpu::make_plan(problem);
  py::dict d;
  d["walk"] = p.walk == cpu::Walk::runs ? "runs" : "columns";
  d["items"] = p.items;
  d["channels_an_item"] = p.channels_an_item;
  d["segments"] = p.segments;
  d["workspace_bytes"] = cpu::workspace_bytes(problem);
  return d;
}

// The numbers of a GPU and of a plan for one, by their names in C++.
#define FASTBN_FIELD(type, name) {#name, &cuda::type::name}
constexpr std::pair<const char*, int64_t cuda::Device::*> device_fields[] = {
    FASTBN_FIELD(Device, multiprocessors),
    FASTBN_FIELD(Device, shared_per_multiprocessor),
    FASTBN_FIELD(Device, shared_per_block),
    FASTBN_FIELD(Device, shared_reserved),
    FASTBN_FIELD(Device, registers_per_multiprocessor),
    FASTBN_FIELD(Device, threads_per_multiprocessor),
    FASTBN_FIELD(Device, bytes_per_microsecond),
};
constexpr std::pair<const char*, int64_t cuda::Plan::*> plan_fields[] = {
    FASTBN_FIELD(Plan, vector),
    FASTBN_FIELD(Plan, threads),
    FASTBN_FIELD(Plan, rows),
    FASTBN_FIELD(Plan, columns),
    FASTBN_FIELD(Plan, columns_a_channel),
    FASTBN_FIELD(Plan, items),
    FASTBN_FIELD(Plan, channels_an_item),
    FASTBN_FIELD(Plan, vectors_a_row),
    FASTBN_FIELD(Plan, lanes_a_row),
    FASTBN_FIELD(Plan, blocks_an_item),
    FASTBN_FIELD(Plan, groups),
    FASTBN_FIELD(Plan, waves),
    FASTBN_FIELD(Plan, blocks),
    FASTBN_FIELD(Plan, shared_bytes),
    FASTBN_FIELD(Plan, scratch_bytes),
    FASTBN_FIELD(Plan, slice_bytes),
    FASTBN_FIELD(Plan, stagger),
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
  d["walk"] = p.walk == cuda::Walk::rows ? "rows" : "columns";
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

py::dict build_info() {
  py::dict d;
  d["torch"] = FASTBN_TORCH_VERSION;
  d["compiler"] = "g++ " __VERSION__;
#if defined(FASTBN_CUDA)
  d["backends"] = std::vector<std::string>{"cpu", "cuda"};
  d["cuda"] = FASTBN_CUDA_VERSION;
  d["cuda_architectures"] = FASTBN_CUDA_ARCHITECTURES;
#else
#if defined(FASTBN_SIMT)
  d["backends"] = std::vector<std::string>{"simt"};
#else
  d["backends"] = std::vector<std::string>{"cpu"};
#endif
  d["cuda"] = py::none();
  d["cuda_architectures"] = py::none();
#endif
  d["cpu_capability"] = cpu::capability();
  d["cpu_capability_of_processor"] = cpu::capability_of_processor();
  return d;
}

// An operator must return a tensor where the function returns none, and never an argument of its own.
std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& moments, double eps, std::string activation,
                                      std::optional<double> param, const OptionalTensor& residual) {
  auto [output, kept] = forward(input, weight, bias, moments, eps, checked_ending(activation, param, residual));
  return {output, moments && kept.is_same(*moments) ? kept.clone() : kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(const Tensor& grad_output, const Tensor& input,
                                                       const OptionalTensor& weight, const Tensor& moments, double eps,
                                                       bool training, std::array<bool, 4> output_mask,
                                                       std::string activation, std::optional<double> param,
                                                       const OptionalTensor& bias, const OptionalTensor& residual) {
  auto [dx, dw, db, dr] = backward(grad_output, input, weight, bias, {moments, Tensor()}, eps, training, output_mask,
                                   checked_ending(activation, param, residual));
  const auto filled = [&](const Tensor& t) { return t.defined() ? t : input.new_empty({0}); };
  return {filled(dx), filled(dw), filled(db), filled(dr.is_same(grad_output) ? dr.clone(output_format(input)) : dr)};
}

void update_running_stats_op(const Tensor& moments, int64_t count, std::optional<double> momentum,
                             const Tensor& running_mean, const Tensor& running_var,
                             const OptionalTensor& num_batches_tracked) {
  update_running_stats(moments, count, {running_mean, running_var, num_batches_tracked, momentum});
}

std::tuple<Tensor, Tensor, Tensor> ghost_backward_op(const Tensor& grad_output, const Tensor& input,
                                                     const OptionalTensor& weight, const Tensor& moments,
                                                     int64_t virtual_batch_size, double eps,
                                                     std::array<bool, 3> output_mask) {
  auto [dx, dw, db] = ghost_backward(grad_output, input, weight, moments, virtual_batch_size, eps, output_mask);
  const auto filled = [&](const Tensor& t) { return t.defined() ? t : input.new_empty({0}); };
  return {filled(dx), filled(dw), filled(db)};
}

void ghost_update_op(const Tensor& moments, int64_t values, int64_t last, std::optional<double> momentum,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked) {
  ghost_update(moments, values, last, {running_mean, running_var, num_batches_tracked, momentum});
}

// As set_python_backward, for ghost batch norm.
void set_python_ghost_backward(py::function function) {
  auto* kept = new py::function(std::move(function));  // never destroyed, either
  set_differentiable_ghost_backward([kept](const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                           const Tensor& moments, int64_t samples, double eps,
                                           std::array<bool, 3> wanted) {
    py::gil_scoped_acquire gil;
    const auto found = (*kept)(dy, x, w, moments, samples, eps, wanted).cast<std::array<OptionalTensor, 3>>();
    std::array<Tensor, 3> grads;
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = found[i].value_or(Tensor());
    return grads;
  });
}

Tensor finish_op(const Tensor& packets, std::optional<double> momentum, const OptionalTensor& running_mean,
                 const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
  return finish(packets, {running_mean, running_var, num_batches_tracked, momentum});
}

Tensor grad_stats_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& packet,
                     double eps, std::string activation, std::optional<double> param, const OptionalTensor& bias,
                     const OptionalTensor& residual) {
  return grad_stats(grad_output, input, weight, bias, packet, eps, checked_ending(activation, param, residual));
}

std::tuple<Tensor, Tensor> grad_apply_op(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                         const Tensor& packet, const Tensor& total, double eps, bool wants_residual,
                                         std::string activation, std::optional<double> param,
                                         const OptionalTensor& bias, const OptionalTensor& residual) {
  auto [dx, dr] = grad_apply(grad_output, input, weight, bias, packet, total, eps, wants_residual,
                             checked_ending(activation, param, residual));
  if (!dr.defined()) dr = input.new_empty({0});
  return {dx, dr.is_same(grad_output) ? dr.clone(output_format(input)) : dr};
}

// As eager_batch_norm in training, for the ranks of an exchange.
py::object exchanging_batch_norm(const std::shared_ptr<cpu::Exchange>& exchange, py::handle input, py::handle weight,
                                 py::handle bias, py::handle running_mean, py::handle running_var,
                                 py::handle num_batches_tracked, py::handle momentum, py::handle eps,
                                 py::handle activation, py::handle activation_param, py::handle residual) {
  const Call call(input, weight, bias, running_mean, running_var, num_batches_tracked, py::bool_(true), momentum, eps,
                  activation, activation_param, residual);
  return call.ok && call.x->is_cpu() && call.x->size(1) <= exchange->channels() ? call.run(exchange) : call.refused();
}

void bind_exchange(py::module_& m) {
  py::class_<cpu::Exchange, std::shared_ptr<cpu::Exchange>>(m, "Exchange")
      .def(py::init([](int file, int64_t rank, int64_t ranks, int64_t channels, double timeout) {
             TORCH_CHECK_VALUE(ranks >= 1 && ranks <= 1 << 16, "ranks should be 1 to 65536, not ", ranks);
             TORCH_CHECK_VALUE(rank >= 0 && rank < ranks, "rank should be 0 to ", ranks - 1, ", not ", rank);
             TORCH_CHECK_VALUE(channels >= 1 && channels <= 1 << 19, "channels should be 1 to 524288, not ", channels);
             TORCH_CHECK_VALUE(timeout > 0, "timeout should be positive, not ", timeout);
             return std::make_shared<cpu::Exchange>(file, rank, ranks, channels, timeout);
           }),
           py::arg("file"), py::arg("rank"), py::arg("ranks"), py::arg("channels"), py::arg("timeout"))
      .def_static("bytes", &cpu::Exchange::bytes, py::arg("ranks"), py::arg("channels"))
      .def_property_readonly("turns", &cpu::Exchange::turns)
      .def("gather", &gather, py::arg("values"), py::call_guard<py::gil_scoped_release>())
      .def("batch_norm", &exchanging_batch_norm, py::arg("input"), py::arg("weight"), py::arg("bias"),
           py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("momentum"),
           py::arg("eps"), py::arg("activation") = "identity", py::arg("activation_param") = py::none(),
           py::arg("residual") = py::none());
}

void implement(torch::Library& m) {
  m.impl("ghost_forward", &ghost_forward);
  m.impl("ghost_backward", &ghost_backward_op);
  m.impl("ghost_update", &ghost_update_op);
  m.impl("forward", &forward_op);
  m.impl("backward", &backward_op);
  m.impl("update_running_stats", &update_running_stats_op);
  m.impl("stats", &stats);
  m.impl("finish", &finish_op);
  m.impl("grad_stats", &grad_stats_op);
  m.impl("grad_apply", &grad_apply_op);
}

}  // namespace

TORCH_LIBRARY(fastbn, m) {
  m.def(
      "forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? moments, float eps, str activation='identity', "
      "float? activation_param=None, Tensor? residual=None) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor moments, float eps, bool training, "
      "bool[4] output_mask, str activation='identity', float? activation_param=None, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "update_running_stats(Tensor moments, SymInt count, float? momentum, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor? num_batches_tracked) -> ()");
  m.def(
      "ghost_forward(Tensor input, Tensor? weight, Tensor? bias, int virtual_batch_size, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "ghost_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor moments, int virtual_batch_size, "
      "float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ghost_update(Tensor moments, SymInt values, SymInt last, float? momentum, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked) -> ()");
  m.def("stats(Tensor input) -> Tensor");
  m.def("gather(Tensor values, int ranks, str group) -> Tensor");  // implemented by exchange.py
  m.def(
      "finish(Tensor packets, float? momentum, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? num_batches_tracked) -> Tensor");
  m.def(
      "grad_stats(Tensor grad_output, Tensor input, Tensor? weight, Tensor packet, float eps, "
      "str activation='identity', float? activation_param=None, Tensor? bias=None, Tensor? residual=None) -> Tensor");
  m.def(
      "grad_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor packet, Tensor total, float eps, "
      "bool wants_residual, str activation='identity', float? activation_param=None, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastbn, CPU, m) { implement(m); }
#if defined(FASTBN_CUDA)
TORCH_LIBRARY_IMPL(fastbn, CUDA, m) { implement(m); }
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  cpu::capability();  // a bad FASTBN_CPU_CAPABILITY is reported by the import
  m.def("batch_norm", &eager_batch_norm, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("training"), py::arg("momentum"),
        py::arg("eps"), py::arg("activation") = "identity", py::arg("activation_param") = py::none(),
        py::arg("residual") = py::none());
  m.def("ghost_batch_norm", &eager_ghost_batch_norm, py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("momentum"),
        py::arg("eps"), py::arg("virtual_batch_size"));
  m.def("check_device", &check_device, py::arg("input"));
  m.def(
      "forward",
      [](const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& moments,
         double eps, std::string_view activation, std::optional<double> param, const OptionalTensor& residual) {
        const Ending end = checked_ending(activation, param, residual);
        py::gil_scoped_release release;
        return forward(input, weight, bias, moments, eps, end);
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("moments"), py::arg("eps"),
      py::arg("activation") = "identity", py::arg("activation_param") = py::none(), py::arg("residual") = py::none());
  m.def(
      "backward",
      [](const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& moments,
         double eps, bool training, std::array<bool, 4> output_mask, std::string_view activation,
         std::optional<double> param, const OptionalTensor& bias, const OptionalTensor& residual) {
        const Ending end = checked_ending(activation, param, residual);
        py::gil_scoped_release release;
        return optional(
            backward(grad_output, input, weight, bias, {moments, Tensor()}, eps, training, output_mask, end));
      },
      py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("moments"), py::arg("eps"),
      py::arg("training"), py::arg("output_mask"), py::arg("activation") = "identity",
      py::arg("activation_param") = py::none(), py::arg("bias") = py::none(), py::arg("residual") = py::none());
  m.def("activations", [] {
    std::map<std::string, std::optional<double>> all;
    for (const auto& [name, param] : activations()) {
      all[std::string(name)] = param == param ? std::optional(param) : std::nullopt;
    }
    return all;
  });
  m.def(
      "update_running_stats",
      [](const Tensor& moments, int64_t count, std::optional<double> momentum, const OptionalTensor& running_mean,
         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
        update_running_stats(moments, count, {running_mean, running_var, num_batches_tracked, momentum});
      },
      py::arg("moments"), py::arg("count"), py::arg("momentum"), py::arg("running_mean"), py::arg("running_var"),
      py::arg("num_batches_tracked"), py::call_guard<py::gil_scoped_release>());
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def("stats", &stats, py::arg("input"), without_gil);
  m.def("finish", &finish_op, py::arg("packets"), py::arg("momentum"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("num_batches_tracked"), without_gil);
  m.def("grad_stats", &grad_stats_op, py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("packet"),
        py::arg("eps"), py::arg("activation") = "identity", py::arg("activation_param") = py::none(),
        py::arg("bias") = py::none(), py::arg("residual") = py::none(), without_gil);
  m.def("grad_apply", &grad_apply_op, py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("packet"),
        py::arg("total"), py::arg("eps"), py::arg("wants_residual"), py::arg("activation") = "identity",
        py::arg("activation_param") = py::none(), py::arg("bias") = py::none(), py::arg("residual") = py::none(),
        without_gil);
  bind_exchange(m);
  m.def("is_watched", &is_watched);
  m.def("set_differentiable_backward", &set_python_backward, py::arg("function"), py::arg("of_ranks"));
  m.def("set_differentiable_ghost_backward", &set_python_ghost_backward, py::arg("function"));
  m.def("plan", &plan, py::arg("sizes"), py::arg("channels_last"), py::arg("element_bytes"));
  m.def("cuda_plan", &cuda_plan, py::arg("sizes"), py::arg("channels_last"), py::arg("element_bytes"),
        py::arg("direction"), py::arg("training"), py::arg("aligned"), py::arg("device"));
#if defined(FASTBN_GPU)
  m.def("cuda_device", &cuda_device, py::arg("input"));
#endif
#if defined(FASTBN_SIMT)
  py::module_ simulator = m.def_submodule("simt");
  bind_simulator(simulator);
#endif
  m.def("cpu_capability", &cpu::capability);
  m.def("build_info", &build_info);
}
