// In: fastbn._C. Out: its functions that tell how the kernels would walk a tensor.
#pragma once

#include <pybind11/pybind11.h>

namespace fastbn {

void bind_plans(pybind11::module_& m);

}  // namespace fastbn
