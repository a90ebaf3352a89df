// The fakes of the operators fastbn::*, as functions of Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastbn {

// Adds the submodule `fakes`, whose functions have the operators' names and arguments; fastbn/ops.py registers them.
void bind_fakes(pybind11::module_& m);

}  // namespace fastbn
