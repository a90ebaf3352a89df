// In: kernels.h. Out: its functions for x86-64 with avx512.
#if defined(__x86_64__)
#include "kernels_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define FASTBN_CAPABILITY avx512
#define FASTBN_VECTOR_BYTES 64
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
