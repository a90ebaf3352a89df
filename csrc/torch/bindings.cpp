// The module fastbn._C.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>

#include "../cpu/backend.h"
#include "../runtime/page_cache.h"
#include "autograd.h"
#include "operators.h"
#include "plans.h"

namespace py = pybind11;

#if defined(FASTBN_SIMT)
void bind_simulator(py::module_& m);  // tests/simt/bindings.cpp
#endif

namespace {

using namespace fastbn;

// torch.nn.Parameter and "identity"; set at import and never released.
PyObject* parameter = nullptr;
PyObject* identity = nullptr;

// Subclasses of Tensor may override operators; Parameter does not.
bool is_tensor_or_parameter(py::handle object) {
  return THPVariable_CheckExact(object.ptr()) || reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == parameter;
}

// A tensor argument of the fast path; sets `ok` to false if the slow path has to be taken.
OptionalTensor fast_path_tensor(py::handle object, bool& ok) {
  if (object.is_none()) return std::nullopt;
  if (!is_tensor_or_parameter(object)) {
    ok = false;
    return std::nullopt;
  }
  const Tensor& t = THPVariable_Unpack(object.ptr());
  ok = ok && is_fast_path_tensor(t);
  return t;
}

// A Python float or int; other numbers that torch accepts take the slow path.
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

// The arguments of a fast-path call.
struct Call {
  bool ok, train;
  OptionalTensor x, w, b, mean, var, counter, residual;
  std::optional<EpilogueArgs> epilogue;
  std::optional<double> momentum;
  double eps;

  Call(py::handle input, py::handle weight, py::handle bias, py::handle running_mean, py::handle running_var,
       py::handle num_batches_tracked, py::handle training, py::handle factor, py::handle epsilon,
       py::handle activation, py::handle activation_param, py::handle added) {
    ok = !input.is_none() && PyBool_Check(training.ptr()) && !is_watched() && !at::impl::torch_function_mode_enabled();
    x = fast_path_tensor(input, ok), w = fast_path_tensor(weight, ok), b = fast_path_tensor(bias, ok);
    mean = fast_path_tensor(running_mean, ok), var = fast_path_tensor(running_var, ok),
    counter = fast_path_tensor(num_batches_tracked, ok);
    residual = fast_path_tensor(added, ok);
    const std::optional<double> param =
        activation_param.is_none() ? std::nullopt : std::optional(number(activation_param, ok));
    if (ok && PyUnicode_Check(activation.ptr())) epilogue = find_epilogue(text(activation), param, residual);
    momentum = factor.is_none() ? std::nullopt : std::optional(number(factor, ok));
    eps = number(epsilon, ok);
    train = training.ptr() == Py_True;
    ok = ok && epilogue && fast_path_eligible(*x, w, b, mean, var, counter, train, eps, residual);
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
  py::object run() const {
    return run([&] { return batch_norm(*x, w, b, mean, var, counter, train, momentum, eps, *epilogue); });
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
                  identity, py::none(), py::none());
  if (!call.ok || virtual_batch_size < 1) return call.refused();
  if (virtual_batch_size == 1 && call.x->numel() == call.x->size(0) * call.x->size(1)) return call.refused();
  return call.run([&] {
    const Statistics statistics{call.mean, call.var, call.counter, call.momentum};
    return ghost_batch_norm(*call.x, call.w, call.b, statistics, virtual_batch_size, call.eps);
  });
}

std::string_view name_of(const EpilogueArgs& epilogue) { return activations()[size_t(epilogue.activation)].first; }
// The parameter in Python: None for activations without one.
std::optional<double> param_of(const EpilogueArgs& epilogue) {
  const double standard = activations()[size_t(epilogue.activation)].second;
  return standard == standard ? std::optional(epilogue.param) : std::nullopt;
}

std::array<OptionalTensor, 4> optional(const Gradients& grads) {
  std::array<OptionalTensor, 4> result;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].defined()) result[i] = grads[i];
  }
  return result;
}

// Gradients returned by Python.
template <size_t N>
std::array<Tensor, N> gradients_of(const py::object& given) {
  const auto found = given.cast<std::array<OptionalTensor, N>>();
  std::array<Tensor, N> grads;
  for (size_t i = 0; i < N; ++i) grads[i] = found[i].value_or(Tensor());
  return grads;
}

// Called when a backward pass is itself differentiated, mapped or traced.
void set_python_backward(py::function function) {
  auto* kept = new py::function(std::move(function));  // not destroyed: the interpreter may end first
  set_differentiable_backward([kept](const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                     const OptionalTensor& b, const Tensor& moments, double eps, bool training,
                                     std::array<bool, 4> wanted, const EpilogueArgs& epilogue) {
    py::gil_scoped_acquire gil;
    return gradients_of<4>(
        (*kept)(dy, x, w, moments, eps, training, wanted, name_of(epilogue), param_of(epilogue), b, epilogue.residual));
  });
}

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

// set_python_backward for ghost batch norm.
void set_python_ghost_backward(py::function function) {
  auto* kept = new py::function(std::move(function));  // not destroyed
  set_differentiable_ghost_backward([kept](const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                                           const Tensor& moments, int64_t chunk_size, double eps,
                                           std::array<bool, 3> wanted) {
    py::gil_scoped_acquire gil;
    return gradients_of<3>((*kept)(dy, x, w, moments, chunk_size, eps, wanted));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  cpu::capability();  // reports a wrong FASTBN_CPU_CAPABILITY at import
  page_cache::open();
  parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  identity = py::str("identity").release().ptr();
  m.def("batch_norm", &eager_batch_norm, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("training"), py::arg("momentum"),
        py::arg("eps"), py::arg("activation") = "identity", py::arg("activation_param") = py::none(),
        py::arg("residual") = py::none());
  m.def("ghost_batch_norm", &eager_ghost_batch_norm, py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("momentum"),
        py::arg("eps"), py::arg("virtual_batch_size"));
  m.def("check_device", &check_device, py::arg("input"));
  m.def("check_memory", &check_memory_of_any, py::arg("tensor"), py::arg("name"));
  m.def(
      "forward",
      [](const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& moments,
         double eps, std::string_view activation, std::optional<double> param, const OptionalTensor& residual) {
        const EpilogueArgs epilogue = parse_epilogue(activation, param, residual);
        py::gil_scoped_release release;
        return forward(input, weight, bias, moments, eps, epilogue);
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("moments"), py::arg("eps"),
      py::arg("activation") = "identity", py::arg("activation_param") = py::none(), py::arg("residual") = py::none());
  m.def(
      "backward",
      [](const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& moments,
         double eps, bool training, std::array<bool, 4> output_mask, std::string_view activation,
         std::optional<double> param, const OptionalTensor& bias, const OptionalTensor& residual) {
        const EpilogueArgs epilogue = parse_epilogue(activation, param, residual);
        py::gil_scoped_release release;
        return optional(
            backward(grad_output, input, weight, bias, {moments, Tensor()}, eps, training, output_mask, epilogue));
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
  m.def("gather_stats", &gather_stats_op, py::arg("all_stats"), py::arg("momentum"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("num_batches_tracked"), without_gil);
  m.def("backward_reduce", &backward_reduce_op, py::arg("grad_output"), py::arg("input"), py::arg("weight"),
        py::arg("batch_stats"), py::arg("eps"), py::arg("activation") = "identity",
        py::arg("activation_param") = py::none(), py::arg("bias") = py::none(), py::arg("residual") = py::none(),
        without_gil);
  m.def("backward_elemt", &backward_elemt_op, py::arg("grad_output"), py::arg("input"), py::arg("weight"),
        py::arg("batch_stats"), py::arg("total"), py::arg("eps"), py::arg("wants_residual"),
        py::arg("activation") = "identity", py::arg("activation_param") = py::none(), py::arg("bias") = py::none(),
        py::arg("residual") = py::none(), without_gil);
  m.def("is_watched", &is_watched);
  m.def("set_differentiable_backward", &set_python_backward, py::arg("function"));
  m.def("set_differentiable_ghost_backward", &set_python_ghost_backward, py::arg("function"));
  bind_plans(m);
#if defined(FASTBN_SIMT)
  py::module_ simulator = m.def_submodule("simt");
  bind_simulator(simulator);
#endif
  m.def("cpu_capability", &cpu::capability);
  m.def("build_info", &build_info);
}
