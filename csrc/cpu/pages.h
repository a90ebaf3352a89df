// The page cache: memory of large tensors and workspaces, kept mapped for the next one of about that size.
#pragma once

#include "../core/platform.h"

namespace fastbn::cpu {

// From here on outputs live in these pages: the first touch of fresh memory costs more than batch norm itself
// (a fault every 4 KiB; on the machine this was written on 45 ms for 100 MB, against 8 ms for the kernel), and the C
// library gives memory back to the system and takes it anew, every step of a training.
constexpr int64_t least_kept_bytes = 256 << 10;

// Reads the limits, once, when the extension is imported; until then nothing is kept. Throws std::runtime_error for a
// FASTBN_CPU_CACHE_MB that is no number of megabytes.
void open_page_cache();

// Backed by huge pages, and aligned to them, where they fit and the system allows. Where the system has no memory, all
// that is kept goes back to it and the request is made again; nullptr if that fails too.
void* take_pages(int64_t bytes);

// Keeps the pages for the next take_pages of about this size (up to an eighth of a power of two less). What is kept in
// all is at most 256 MB, and 1/32 of what memory_limit.h says; or FASTBN_CPU_CACHE_MB, but more than 256 MB only up to
// 5/4 of what was in use at once a short time ago. A block that nobody takes goes back to the system after 5 s.
void give_pages(void* data, int64_t bytes);

// Gives all that is kept back to the system; false if that was nothing.
bool release_pages();

}  // namespace fastbn::cpu
