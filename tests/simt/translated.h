// Launches of translated PTX (tests/ptx) in the place of the C++ kernels. FASTBN_SIMT_PTX names the library that
// tests/ptx/build.py made; without it the C++ kernels run. The library has a machine of its own, so that one build of
// the extension or of a program serves any of them: what both need to know of each other is in TranslatedLaunch.
#pragma once

#include <dlfcn.h>

#include "machine.h"

namespace simt {

struct Argument {
  const void* data;
  size_t bytes, alignment;
};

struct TranslatedLaunch {
  const void* kernel;  // the address of the C++ kernel, whose symbol is the name of the entry
  int64_t blocks, threads, dynamic_bytes;
  bool cooperative;
  int64_t cluster;
  const std::vector<Argument>* arguments;
  const Config* config;
  Stats* stats;
  const std::vector<Watch*>* watches;
};
// Null, or what went wrong.
using Translated = const char*(const TranslatedLaunch&);

inline void* translated_symbol(const char* name) {
  static void* const library = [] {
    const char* path = std::getenv("FASTBN_SIMT_PTX");
    if (path == nullptr || *path == 0) return static_cast<void*>(nullptr);
    void* const opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) throw error(std::string("simt: FASTBN_SIMT_PTX: ") + dlerror());
    return opened;
  }();
  if (library == nullptr) return nullptr;
  void* const found = dlsym(library, name);
  if (found == nullptr) throw error(std::string("simt: FASTBN_SIMT_PTX names no library of tests/ptx: ") + dlerror());
  return found;
}

// Whether the launch went to translated PTX.
inline bool launch_translated(const void* kernel, int64_t blocks, int64_t threads, int64_t dynamic_bytes,
                              bool cooperative, int64_t cluster, const std::vector<Argument>& arguments) {
  static Translated* const translated = reinterpret_cast<Translated*>(translated_symbol("ptx_launch"));
  if (translated == nullptr) return false;
  const char* failed =
      translated({kernel, blocks, threads, dynamic_bytes, cooperative, cluster, &arguments, &config, &stats, &watches});
  if (failed != nullptr) throw error(failed);
  return true;
}

}  // namespace simt
