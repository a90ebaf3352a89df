// The numbers of the current device that plans are made for.
#pragma once

#include "plan.h"

namespace fastbn::cuda {

Device current_numbers();

}  // namespace fastbn::cuda
