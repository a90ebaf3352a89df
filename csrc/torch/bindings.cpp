// The module fastbn._C.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>

#include "../cpu/backend.h"
#include "../runtime/page_cache.h"
#include "arguments.h"
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

// The arguments of a call; `ok` if it can take the fast path.
struct Call {
  bool ok;
  BatchNormArgs args;

  Call(py::handle input, py::handle weight, py::handle bias, py::handle running_mean, py::handle running_var,
       py::handle num_batches_tracked, py::handle training, py::handle momentum, py::handle eps, py::handle activation,
       py::handle activation_param, py::handle residual) {
    ok = !input.is_none() && PyBool_Check(training.ptr()) && !is_watched() && !at::impl::torch_function_mode_enabled();
    args.input = fast_path_tensor(input, ok).value_or(Tensor());
    args.weight = fast_path_tensor(weight, ok), args.bias = fast_path_tensor(bias, ok);
    args.running_mean = fast_path_tensor(running_mean, ok), args.running_var = fast_path_tensor(running_var, ok);
    args.num_batches_tracked = fast_path_tensor(num_batches_tracked, ok);
    const OptionalTensor added = fast_path_tensor(residual, ok);
    args.training = training.ptr() == Py_True;
    if (!momentum.is_none()) args.momentum = number(momentum, ok);
    args.eps = number(eps, ok);
    const std::optional<double> param =
        activation_param.is_none() ? std::nullopt : std::optional(number(activation_param, ok));
    ok = ok && PyUnicode_Check(activation.ptr());
    if (!ok) return;
    const auto epilogue = find_epilogue(text(activation), param, added);
    if (epilogue) args.epilogue = *epilogue;
    ok = epilogue && fast_path_eligible(args);
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
  static py::object refused() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }
};

py::object eager_batch_norm(py::handle input, py::handle weight, py::handle bias, py::handle running_mean,
                            py::handle running_var, py::handle num_batches_tracked, py::handle training,
                            py::handle momentum, py::handle eps, py::handle activation, py::handle activation_param,
                            py::handle residual) {
  const Call call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                  activation, activation_param, residual);
  return call.ok ? call.run([&] { return batch_norm(call.args); }) : call.refused();
}

py::object eager_ghost_batch_norm(py::handle input, py::handle weight, py::handle bias, py::handle running_mean,
                                  py::handle running_var, py::handle num_batches_tracked, py::handle momentum,
                                  py::handle eps, int64_t virtual_batch_size) {
  const Call call(input, weight, bias, running_mean, running_var, num_batches_tracked, py::bool_(true), momentum, eps,
                  identity, py::none(), py::none());
  if (!call.ok || virtual_batch_size < 1) return call.refused();
  validate_chunks(call.args.input, virtual_batch_size);
  return call.run([&] { return ghost_batch_norm(call.args, virtual_batch_size); });
}

// The slow path's validation, of tensors of any kind.
void validate_call(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps,
                   const OptionalTensor& residual, bool whole_batch, bool by_kernels) {
  BatchNormArgs args;
  args.input = input;
  args.weight = weight, args.bias = bias;
  args.running_mean = running_mean, args.running_var = running_var;
  args.training = training;
  args.eps = eps;
  args.epilogue.residual = residual;
  validate(args, whole_batch, by_kernels);
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
  m.def("validate", &validate_call, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("training"), py::arg("eps"), py::arg("residual") = py::none(),
        py::arg("whole_batch") = true, py::arg("by_kernels") = true);
  m.def("validate_chunks", &validate_chunks, py::arg("input"), py::arg("virtual_batch_size"));
  m.def("check_device", &check_device, py::arg("input"));
  m.def("check_memory", &check_memory_of_any, py::arg("tensor"), py::arg("name"));
  m.def("activations", [] {
    std::map<std::string, std::optional<double>> all;
    for (const auto& [name, param] : activations()) {
      all[std::string(name)] = param == param ? std::optional(param) : std::nullopt;
    }
    return all;
  });
  m.def("is_watched", &is_watched);
  m.def("output_format", &output_format, py::arg("input"));
  m.def(
      "param_dtype",
      [](at::ScalarType input, std::optional<at::ScalarType> weight) { return param_dtype(input, weight); },
      py::arg("input"), py::arg("weight"));
  bind_fakes(m);
  bind_plans(m);
#if defined(FASTBN_SIMT)
  py::module_ simulator = m.def_submodule("simt");
  bind_simulator(simulator);
#endif
  m.def("cpu_capability", &cpu::capability);
  m.def("build_info", &build_info);
}
