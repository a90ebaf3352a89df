#include <cstdlib>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "query.h"

namespace fastbn::cuda {

namespace {

// Multiprocessors that the plans leave to kernels of other streams: a cooperative launch waits until all of its blocks
// fit at once, so it would wait for a collective that holds some of them.
int64_t margin() {
  static const int64_t value = [] {
    const char* const text = std::getenv("FASTBN_SM_MARGIN");
    if (text == nullptr || *text == 0) return int64_t(0);
    char* end = nullptr;
    const long long n = std::strtoll(text, &end, 10);
    if (*end != 0 || n < 0) {
      throw std::runtime_error(std::string("fastbn: FASTBN_SM_MARGIN should be a number of multiprocessors, not ") +
                               text);
    }
    return int64_t(n);
  }();
  return value;
}

}  // namespace

Device current_numbers() {
  Device device = query_device();
  device.multiprocessors = larger<int64_t>(1, device.multiprocessors - margin());
  return device;
}

}  // namespace fastbn::cuda
