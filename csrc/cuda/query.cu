#include "device.cuh"
#include "query.h"

namespace fastbn::cuda {

Device current_numbers() { return query_device(); }

}  // namespace fastbn::cuda
