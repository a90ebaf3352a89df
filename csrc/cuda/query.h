// The numbers of the current device, for descriptions of plans.
#pragma once

#include "plan.h"

namespace fastbn::cuda {

Device current_numbers();

}  // namespace fastbn::cuda
