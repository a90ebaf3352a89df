// The memory that this process may use: limits of its control groups (containers, batch systems) and of the machine.
#pragma once

#include <cstdint>
#include <string>

namespace fastbn::runtime {

// The smallest of the machine's memory and memory.max, memory.high (cgroup v2) and memory.limit_in_bytes (cgroup v1) of
// the control groups of the process and their parents. Files are looked up under `root`, which is "" outside of tests;
// a missing or unreadable file sets no limit.
int64_t memory_limit(const std::string& root = "");

}  // namespace fastbn::runtime
