// Includes what kernels.h needs, before an instruction set is enabled: no inline function of a library
// may be compiled with instructions that another processor lacks.
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
