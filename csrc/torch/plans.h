// Adds the functions that describe plans to fastbn._C.
#pragma once

#include <pybind11/pybind11.h>

namespace fastbn {

void bind_plans(pybind11::module_& m);

}  // namespace fastbn
