// Which kernels and kinds of plans were run, and how often each byte of a tensor was read and written.
#pragma once

#include <map>
#include <set>

#include "cuda/plan.h"
#include "driver_cases.h"

namespace driver {

using namespace fastbn;

using cuda::Pass, cuda::Plan, cuda::Strategy, cuda::AccessPattern;

// What was reached, for example "resident rows forward, several blocks, several waves".
inline std::map<std::string, int> reached;

// The kernels are templates of these; empty: of batch norm alone.
inline std::string kernel_of(const Plan& plan, DType dtype, const Epilogue& e, const void* mask,
                             const void* grad_residual, Pass pass) {
  const bool forward = pass == Pass::forward, narrow = plan.vector == 1 || dtype == DType::f64;
  if (mask != nullptr && !forward) return ", masked";
  if (e.activation == Activation::identity && (forward ? e.residual : grad_residual) == nullptr) return "";
  if (narrow || e.activation != Activation::relu) return ", any";
  if (e.residual == nullptr && grad_residual == nullptr) return ", relu";
  return forward ? ", relu of a sum" : ", any";
}

inline std::vector<std::string> names_of(const Plan& plan, Pass pass, bool training, const std::string& kernel = "") {
  std::string base = plan.strategy == Strategy::resident ? "resident" : training ? "streaming" : "streaming eval";
  base += plan.pattern == AccessPattern::rows ? " rows" : " columns";
  base += pass == Pass::forward ? " forward" : " backward";
  std::vector<std::string> names = {base + (plan.batch_splits > 1 ? ", several blocks" : ", one block")};
  if (plan.strategy == Strategy::resident && plan.waves > 1) names.push_back(base + ", several waves");
  if (plan.vector == 1) names.push_back(base + ", scalar");
  if (plan.cluster > 1) names.push_back(base + (plan.batch_splits > plan.cluster ? ", clusters" : ", a cluster"));
  if (plan.cluster == 1 && plan.subgroup > 1) names.push_back(base + ", subgroups");
  if (!kernel.empty()) names.push_back(base + kernel);
  return names;
}

inline std::set<std::string> set_of(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

inline std::set<std::string> all_names() {
  std::set<std::string> names;
  for (const AccessPattern pattern : {AccessPattern::rows, AccessPattern::columns}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      for (const int64_t blocks : {1, 2}) {
        Plan plan{};
        plan.pattern = pattern, plan.batch_splits = blocks, plan.waves = 2, plan.vector = 4;
        plan.strategy = Strategy::resident;
        for (const char* kernel : {", relu", pass == Pass::forward ? ", relu of a sum" : ", masked", ", any"}) {
          for (const auto& name : names_of(plan, pass, true, kernel)) names.insert(name);
        }
        plan.cluster = plan.subgroup = 2;
        if (pattern == AccessPattern::columns && blocks > 1) names.merge(set_of(names_of(plan, pass, true)));
        plan.batch_splits = 4;
        if (pattern == AccessPattern::columns) names.merge(set_of(names_of(plan, pass, true)));
        plan.batch_splits = blocks, plan.cluster = 1, plan.subgroup = blocks;
        for (const auto& name : names_of(plan, pass, true)) names.insert(name);
        plan.strategy = Strategy::streaming, plan.vector = 1;
        for (const bool training : {false, true}) {
          if (pass == Pass::forward && !training) continue;  // the same kernel as in training
          for (const auto& name : names_of(plan, pass, training)) names.insert(name);
        }
      }
    }
  }
  return names;
}

inline std::unique_ptr<Scratch> counters;

// One call of the backend: launches, bytes, barrier counters.
template <class Body>
inline void call(const Case& c, const Plan& plan, Pass pass, bool training, const std::string& kernel,
                 const Body& body) {
  for (const auto& name : names_of(plan, pass, training, kernel)) ++reached[name];
  doing = c.name + epilogue_name + ", " + names_of(plan, pass, training)[0] + kernel + ": " +
          std::to_string(plan.channel_tiles) + " tiles of " + std::to_string(plan.channels_per_tile) + " channels, " +
          std::to_string(plan.batch_splits) + " blocks a tile, " + std::to_string(plan.waves) + " waves, " +
          std::to_string(plan.vector) + " elements an access, " + std::to_string(plan.shared_bytes) + " bytes shared";
  simt::stats = {};
  constexpr size_t half = cuda::counter_bytes / 2 / sizeof(unsigned);
  unsigned* const barriers = static_cast<unsigned*>(counters->data());
  body(cuda::Stream{nullptr, barriers, barriers + half});
  if (plan.strategy == Strategy::resident && simt::stats.launches != 1) {
    wrong(c, std::to_string(simt::stats.launches) + " launches of the resident strategy");
  }
  // Those of barriers, in the first half, may have their top bit set: it flips with each barrier.
  constexpr size_t sector = cuda::barrier_bytes / sizeof(unsigned);
  for (size_t i = 0; i < 2 * half; ++i) {
    const unsigned n = barriers[i];
    if (n == 0 || (n == 0x80000000u && i < half && i % sector == 0)) continue;
    wrong(c, "counter " + std::to_string(i) + " is " + std::to_string(n) + " after the launch");
  }
}

inline void written_once(const Case& c, const char* what, const simt::Watch& watch) {
  for (size_t i = 0; i < watch.writes.size(); ++i) {
    if (watch.writes[i] == 1 && watch.reads[i] == 0) continue;
    wrong(c, std::string(what) + " byte " + std::to_string(i) + " was written " + std::to_string(watch.writes[i]) +
                 " times and read " + std::to_string(watch.reads[i]) + " times");
  }
}

// Every byte `least` times, and not more often but for `spare` bytes: the first value of a channel, as pivot.
inline void was_read(const Case& c, const char* what, const simt::Watch& watch, int64_t least, int64_t spare) {
  int64_t more = 0;
  for (size_t i = 0; i < watch.reads.size(); ++i) {
    more += watch.reads[i] - least;
    if (watch.writes[i] == 0 && watch.reads[i] >= least) continue;
    wrong(c, std::string(what) + " byte " + std::to_string(i) + " was read " + std::to_string(watch.reads[i]) +
                 " times, not " + std::to_string(least) + ", and written " + std::to_string(watch.writes[i]) +
                 " times");
  }
  if (more > spare)
    wrong(c, std::string(what) + " was read more often than planned, by bytes: " + std::to_string(more));
}

}  // namespace driver
