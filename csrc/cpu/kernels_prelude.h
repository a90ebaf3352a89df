// In: nothing. Out: all that kernels.h needs, included before the compiler is told to use an instruction set,
// so that no inline function of a library is compiled with instructions that another processor lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../core/dispatch.h"
#include "../core/formula.h"
#include "../core/moments.h"
#include "capability.h"
#include "parallel.h"
#include "plan.h"
