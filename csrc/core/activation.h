// In: z, what batch norm makes before its activation. Out: y = act(z), and dz from dy: the epilogue of every kernel.
#pragma once

#include "platform.h"

namespace fastbn {

// The hook that every kernel of csrc/cuda has: forward(z) is y, backward(dy, z) is dz; z() is only made where needed.
struct Identity {
  template <class A>
  FASTBN_HD A forward(A z) const {
    return z;
  }
  template <class A, class Z>
  FASTBN_HD A backward(A dy, const Z&) const {
    return dy;
  }
};

}  // namespace fastbn
