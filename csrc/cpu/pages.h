// In: sizes of large tensors. Out: memory that is mapped already, if a tensor of that size was freed before.
#pragma once

#include "../core/platform.h"

namespace fastbn::cpu {

// From here on outputs live in these pages: the first touch of fresh memory costs more than batch norm itself
// (a fault every 4 KiB; on the machine this was written on 45 ms for 100 MB, against 8 ms for the kernel).
constexpr int64_t large_bytes = 4 << 20;

// Aligned to a huge page, and backed by huge pages where the system allows. Throws std::bad_alloc.
void* take_pages(int64_t bytes);

// Keeps the pages for the next take_pages of about this size, up to a limit for all that is kept: 1/32 of the
// machine's memory, or FASTBN_CPU_CACHE_MB. What is kept is marked as free for the system to take back, but for the
// quarter of that limit that was freed last.
void give_pages(void* data, int64_t bytes);

}  // namespace fastbn::cpu
