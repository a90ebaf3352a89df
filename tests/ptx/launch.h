// A launch of a translated entry: what its threads share.
#pragma once

#include "counting.h"
#include "order.h"
#include "thread.h"

namespace ptx {

struct Launch {
  const Entry& entry;
  const unsigned char* params;
  size_t params_bytes;
  MemoryOrder order;
  Counting* counting = nullptr;  // null where nothing is counted
};

}  // namespace ptx
