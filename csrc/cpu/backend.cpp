// Chooses the widest instruction set at run time.
#include "backend.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

#include "capability.h"

namespace fastbn::cpu {

namespace {

struct Capability {
  const char* name;
  int64_t vector_bytes;
  bool present;
  void (*forward)(const Plan&, const Forward&);
  void (*backward)(const Plan&, const Backward&);
};

// From the widest to the baseline.
const Capability* capabilities() {
#if defined(FASTBN_WIDER_SETS)
  static const Capability all[] = {
      {"avx512", 64,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"),
       avx512::run_forward, avx512::run_backward},
      {"avx2", 32, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       avx2::run_forward, avx2::run_backward},
      {"baseline", 16, true, baseline::run_forward, baseline::run_backward},
  };
#else
  static const Capability all[] = {{"baseline", 16, true, baseline::run_forward, baseline::run_backward}};
#endif
  return all;
}

const Capability& widest() {
  const Capability* c = capabilities();
  while (!c->present) ++c;
  return *c;
}

const Capability& choose() {
  const char* wanted = std::getenv("FASTBN_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == 0) return widest();
  std::string names;
  for (const Capability* c = capabilities();; ++c) {
    if (c->present && std::string(wanted) == c->name) return *c;
    if (c->present) names += std::string(names.empty() ? "" : ", ") + c->name;
    if (std::string("baseline") == c->name) break;
  }
  throw std::runtime_error("FASTBN_CPU_CAPABILITY is '" + std::string(wanted) +
                           "', but this processor and build offer: " + names);
}

const Capability& chosen() {
  static const Capability& c = choose();
  return c;
}

// The L3 cache of the cores that share one with this core, from sysfs: the C library adds up the caches of all dies
// (320 MB instead of 32 on an EPYC with ten dies).
int64_t third_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kilobytes = 0;
  char unit = 0;
  if (file >> kilobytes >> unit && unit == 'K' && kilobytes > 0) return kilobytes << 10;
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? int64_t(bytes) : int64_t(32) << 20;
}

// What of it a pass can count on. A larger one is shared by many cores, whose programs take their part: with 105 MB on
// a Xeon, passes over 26 to 50 MB take 1.2 to 2 times as long if their outputs stay in it (NOTES.md#streaming-stores).
constexpr int64_t most_bytes = 32 << 20;

// Read when the library is loaded, not in the first call: a process that forks meanwhile would leave its child waiting
// for the initialization.
const int64_t third_level_bytes = smaller(third_level_cache(), most_bytes);

}  // namespace

const char* capability() { return chosen().name; }
const char* capability_of_processor() { return widest().name; }

Plan plan(const Problem& problem) {
  Plan plan = make_plan(problem);
  const int64_t channels = problem.shape.C;
  const int64_t coefficient_bytes = problem.dtype == DType::f64 ? 8 : 4;
  plan.workspace_bytes = coefficients * padded_channels(channels) * coefficient_bytes +
                         plan.batch_splits * 2 * channels * int64_t(sizeof(double));
  // One word of bits per pack, see Bits in epilogue.h.
  const int64_t pack = chosen().vector_bytes / size_of(problem.dtype);
  plan.mask_bytes = plan.slots(pack, problem.shape) * larger<int64_t>(1, pack / 8);
  return plan;
}

void forward(const Plan& plan, const Forward& args) { chosen().forward(plan, args); }
void backward(const Plan& plan, const Backward& args) { chosen().backward(plan, args); }

// In training the other pass needs as much cache. NOTES.md#streaming-stores has the measurements.
int64_t cached_bytes(bool alone) { return alone ? third_level_bytes : third_level_bytes / 2; }

}  // namespace fastbn::cpu
