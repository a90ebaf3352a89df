// kernels.h for x86-64 with AVX-512.
#include "capability.h"

#if defined(FASTBN_WIDER_SETS)
#include "kernels_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
// GCC 12 warns that the AVX-512 intrinsics of its own headers use uninitialized values.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define FASTBN_CAPABILITY avx512
#define FASTBN_VECTOR_BYTES 64
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
