// kernels.h for x86-64 with AVX2.
#include "capability.h"

#if defined(FASTBN_WIDER_SETS)
#include "kernels_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTBN_CAPABILITY avx2
#define FASTBN_VECTOR_BYTES 32
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
