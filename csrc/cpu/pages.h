// In: sizes of tensors and workspaces. Out: memory that is mapped already, if one of about that size was freed before.
#pragma once

#include "../core/platform.h"

namespace fastbn::cpu {

// From here on outputs live in these pages: the first touch of fresh memory costs more than batch norm itself
// (a fault every 4 KiB; on the machine this was written on 45 ms for 100 MB, against 8 ms for the kernel), and the C
// library gives memory back to the system and takes it anew, every step of a training.
constexpr int64_t least_kept_bytes = 256 << 10;

// Backed by huge pages, and aligned to them, where they fit and the system allows. Throws std::bad_alloc.
void* take_pages(int64_t bytes);

// Keeps the pages for the next take_pages of about this size (up to an eighth of a power of two less), up to a limit
// for all that is kept: 1/32 of the machine's memory, or FASTBN_CPU_CACHE_MB. What is kept is marked as free for the
// system to take back, but for the quarter of that limit that was freed last.
void give_pages(void* data, int64_t bytes);

}  // namespace fastbn::cpu
