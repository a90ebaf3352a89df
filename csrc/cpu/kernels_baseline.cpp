// kernels.h for any processor of the architecture (x86-64: SSE2; Arm: NEON).
#include "kernels_prelude.h"

#define FASTBN_CAPABILITY baseline
#define FASTBN_VECTOR_BYTES 16
#include "kernels.h"
