// The page cache keeps the memory of large outputs and workspaces mapped for the next one of about the same size.
#pragma once

#include "../core/platform.h"

namespace fastbn::page_cache {

// Outputs of at least this size use the cache. The first touch of fresh memory costs more than batch norm itself: a
// page fault every 4 KiB, 45 ms for 100 MB where the kernel takes 8 ms. The C library returns such memory to the system
// when it is freed, so every training step would pay again.
constexpr int64_t min_bytes = 256 << 10;

// Reads the limits when the extension is imported; before that nothing is kept. Throws std::runtime_error if
// FASTBN_CPU_CACHE_MB is not a number of megabytes.
void open();

// Aligned to huge pages and backed by them where they fit and the system allows. If the system has no memory left, the
// cache is trimmed and the request repeated; nullptr if that fails too.
void* acquire(int64_t bytes);

// Keeps the block for the next acquire() of about this size (within an eighth of a power of two). The cache holds at
// most 256 MB and 1/32 of memory_limit(), or FASTBN_CPU_CACHE_MB, of which more than 256 MB is used only up to 5/4 of
// what was recently in use at once. A block that is idle for 5 s is unmapped.
void release(void* data, int64_t bytes);

// Unmaps everything that is kept; false if there was nothing.
bool trim();

}  // namespace fastbn::page_cache
