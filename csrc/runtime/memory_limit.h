// How much memory this process may use: limits of its control groups (containers, batch systems) and the machine's.
#pragma once

#include <cstdint>
#include <string>

namespace fastbn::runtime {

// The smallest of: the machine's memory; memory.max and memory.high (cgroup v2) and memory.limit_in_bytes (cgroup v1)
// of the process's own control groups and of all their parents. Files are looked for under `root`, which is "" outside
// of tests; one that is missing or cannot be read sets no limit.
int64_t memory_limit(const std::string& root = "");

}  // namespace fastbn::runtime
