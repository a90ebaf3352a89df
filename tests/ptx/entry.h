// What translate.py knows of an entry, and writes beside its code: parameters and static arrays for launches, basic
// blocks, loops and memory accesses for the counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

constexpr int classes = 13;  // in the order of CLASSES in flow.py
constexpr const char* class_names[classes] = {"global",  "shared",     "copy",    "fp32",    "fp64",
                                              "special", "conversion", "integer", "control", "shuffle",
                                              "barrier", "move",       "param"};

enum class Kind : uint8_t { load, store, atomic, copy, barrier };
enum class Space : uint8_t { global, shared };

struct Block {
  unsigned counts[classes];
  int header;              // the loop that it is the header of, or -1
  std::vector<int> loops;  // that it is in, outer ones first
  const char* source;
};
struct Loop {
  int header;
  std::vector<int> latches;
};
struct Site {
  Kind kind;
  Space space;
  unsigned bytes;  // a lane
  int block;
  const char *name, *source;
};

class Thread;
struct Extent {
  size_t bytes, alignment;
};
struct Entry {
  std::string name;
  void (*code)(Thread&, const unsigned char*);
  std::vector<Extent> params, statics;
  const Block* blocks;
  int block_count;
  const Loop* loops;
  int loop_count;
  const Site* sites;
  int site_count;

  Entry(const char* name, void (*code)(Thread&, const unsigned char*), std::vector<Extent> params,
        std::vector<Extent> statics, const Block* blocks, int block_count, const Loop* loops, int loop_count,
        const Site* sites, int site_count);
  bool counted() const { return blocks != nullptr; }
};

}  // namespace ptx
