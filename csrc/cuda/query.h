// In: the current device. Out: what the planner wants to know of it.
#pragma once

#include "plan.h"

namespace fastbn::cuda {

Device current_numbers();

}  // namespace fastbn::cuda
