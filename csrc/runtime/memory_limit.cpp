#include "memory_limit.h"

#include <unistd.h>

#include <fstream>

#include "../core/platform.h"

namespace fastbn::runtime {

namespace {

// Lowers the limit to the number at the start of a file; "max", or no file, changes nothing.
void lower(int64_t& limit, const std::string& path) {
  std::ifstream file(path);
  int64_t bytes = 0;
  if (file >> bytes && bytes > 0) limit = smaller(limit, bytes);
}

// Whether the comma-separated list `names` contains the name.
bool lists(const std::string& names, const char* name) {
  return ("," + names + ",").find("," + std::string(name) + ",") != std::string::npos;
}

}  // namespace

int64_t memory_limit(const std::string& root) {
  int64_t limit = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  // Lines of hierarchy:controllers:path. cgroup v2 is hierarchy 0, without controllers.
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && !lists(controllers, "memory")) continue;
    const std::string mount = root + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    // A container may see its path on the host while its own group is mounted as the root: the loop ends there.
    std::string path = line.substr(second + 1);
    while (true) {
      if (path == "/") path.clear();
      if (v2) {
        lower(limit, mount + path + "/memory.max");
        lower(limit, mount + path + "/memory.high");
      } else {
        lower(limit, mount + path + "/memory.limit_in_bytes");
      }
      if (path.empty()) break;
      const size_t slash = path.rfind('/');
      path.resize(slash == std::string::npos ? 0 : slash);
    }
  }
  return limit;
}

}  // namespace fastbn::runtime
