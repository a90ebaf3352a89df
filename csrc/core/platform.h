// Macros and helpers that let one source serve host and device.
#pragma once

#include <cstdint>

// Everything in core/ is always inlined: the CPU kernels are compiled once per instruction set, and an
// out-of-line copy made with AVX-512 must never be the one that the linker keeps for everybody.
#if defined(__CUDACC__)
#define FASTBN_HD __host__ __device__ __forceinline__
#else
#define FASTBN_HD inline __attribute__((always_inline))
#endif

namespace fastbn {

FASTBN_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTBN_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
FASTBN_HD constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTBN_HD constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace fastbn
