// In: calls from Python tests. Out: the emulated GPU's numbers set, what its kernels read and wrote counted; the
// submodule fastbn._C.simt, in the simulated build alone.
#include <pybind11/pybind11.h>

#include <map>
#include <utility>
#include <vector>

#include "machine.h"

namespace py = pybind11;

namespace {

const std::pair<const char*, int64_t simt::Config::*> numbers[] = {
    {"resident", &simt::Config::resident},
    {"multiprocessors", &simt::Config::multiprocessors},
    {"shared_per_multiprocessor", &simt::Config::shared_per_multiprocessor},
    {"shared_per_block", &simt::Config::shared_per_block},
    {"shared_reserved", &simt::Config::shared_reserved},
    {"registers_per_multiprocessor", &simt::Config::registers_per_multiprocessor},
    {"registers_per_thread", &simt::Config::registers_per_thread},
    {"threads_per_multiprocessor", &simt::Config::threads_per_multiprocessor},
    {"bytes_per_microsecond", &simt::Config::bytes_per_microsecond},
    {"cluster", &simt::Config::cluster},
};

// The backend keeps the numbers of each device: other numbers are another device.
int64_t device_with(const simt::Config& config) {
  static std::map<std::vector<int64_t>, int64_t> known;
  std::vector<int64_t> key{config.cooperative};
  for (const auto& [name, member] : numbers) key.push_back(config.*member);
  return known.emplace(key, int64_t(known.size())).first->second;
}

py::dict configuration() {
  py::dict d;
  d["seed"] = simt::config.seed;
  for (const auto& [name, member] : numbers) d[name] = simt::config.*member;
  d["cooperative"] = simt::config.cooperative;
  return d;
}

void configure(const py::kwargs& changes) {
  simt::Config config = simt::config;
  for (const auto& [key, value] : changes) {
    const auto name = key.cast<std::string>();
    bool found = true;
    if (name == "seed") {
      config.seed = value.cast<uint64_t>();
    } else if (name == "cooperative") {
      config.cooperative = value.cast<bool>();
    } else {
      found = false;
      for (const auto& [other, member] : numbers) {
        if (name == other) config.*member = value.cast<int64_t>(), found = true;
      }
    }
    if (!found) throw py::type_error("configure() got an unexpected keyword argument '" + name + "'");
  }
  config.device = device_with(config);
  simt::config = config;
}

py::dict take_stats() {
  const simt::Stats s = std::exchange(simt::stats, {});
  py::dict d;
  d["launches"] = s.launches;
  d["blocks"] = s.blocks;
  d["bytes_read"] = s.bytes_read;
  d["bytes_written"] = s.bytes_written;
  d["fresh_bytes"] = s.fresh_bytes;
  d["atomics"] = s.atomics;
  d["translated"] = s.translated;
  d["queries"] = s.queries;
  return d;
}

}  // namespace

void bind_simulator(py::module_& m) {
  simt::config.device = device_with(simt::config);
  m.def("configure", &configure);
  m.def("configuration", &configuration);
  m.def("take_stats", &take_stats);
}
