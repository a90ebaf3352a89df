// The driver's cases: random inputs as a function of the seed, GPUs, and comparisons with expected values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "cuda/backend.h"
#include "cuda/device.cuh"

namespace driver {

using namespace fastbn;

// ---- random numbers: what is tested is a function of the seed ------------------------------------------------------

inline uint64_t state = 1;
inline uint64_t random_bits() {
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d >> 11;
}
inline int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
inline double uniform() { return double(random_bits()) * 0x1p-53; }
// Variance 1, and never further than 3 from 0, so that no first value of a channel is an outlier.
inline double noise() { return 2 * (uniform() + uniform() + uniform()) - 3; }

// ---- tensors -------------------------------------------------------------------------------------------------------

// On the heap, and ends with it, so that ASan sees what reads or writes too far.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t count, bool misaligned = false) : dtype_(dtype), count_(count) {
    const size_t offset = misaligned ? size_t(size_of(dtype)) : 0, bytes = size_t(count * size_of(dtype));
    memory_.reset(new char[offset + bytes]);
    data_ = memory_.get() + offset;
    std::memset(data_, 0xff, bytes);  // NaN
  }
  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  size_t bytes() const { return size_t(count_ * size_of(dtype_)); }
  Param param() const { return {data_, dtype_}; }
  Output output() const { return {data_, dtype_}; }
  double get(int64_t i) const { return read({data_, dtype_}, i, NAN); }
  void set(int64_t i, double value) { write({data_, dtype_}, i, value); }

 private:
  DType dtype_ = DType::f32;
  int64_t count_ = 0;
  std::unique_ptr<char[]> memory_;
  char* data_ = nullptr;
};

// Scratch memory, with a margin around it that shows what was written beside it; ASan sees that by itself.
class Scratch {
 public:
  Scratch(int64_t bytes, int fill) : bytes_(size_t(bytes)) {
    if (posix_memalign(&memory_, 256, bytes_ + 2 * margin) != 0) std::abort();
    std::memset(memory_, 0x5a, bytes_ + 2 * margin);
    std::memset(data(), fill, bytes_);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  void* data() const { return static_cast<char*>(memory_) + margin; }
  bool margins_hold() const {
    const char *before = static_cast<const char*>(memory_), *after = before + margin + bytes_;
    const auto holds = [](char c) { return c == 0x5a; };
    return std::all_of(before, before + margin, holds) && std::all_of(after, after + margin, holds);
  }

 private:
  static constexpr size_t margin = SIMT_ASAN ? 0 : 16 << 10;
  size_t bytes_;
  void* memory_ = nullptr;
};

inline double epsilon(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

struct Gpu {
  const char* name;
  int64_t multiprocessors, shared_per_multiprocessor, shared_per_block;
  bool cooperative;
  int64_t cluster, merged_at_once;
};
constexpr Gpu gpus[] = {
    {"small", 4, 64 << 10, 48 << 10, true, 1, 512},    // groups of several blocks, several waves
    {"roomy", 6, 200 << 10, 160 << 10, true, 2, 512},  // a channel tile fits in a block, or in a small cluster
    {"alone", 4, 64 << 10, 48 << 10, false, 1, 4},     // no cooperative launches; the last block of a subgroup merges
    {"poor", 2, 36 << 10, 34 << 10, true, 1, 4},       // little fits
    {"many", 13, 36 << 10, 34 << 10, true, 1, 4},      // subgroups of the blocks of a group
    {"clustered", 6, 64 << 10, 48 << 10, true, 4, 512},
};

struct Case {
  std::string name;
  Problem problem;
  bool misaligned, odd_values;
};

inline std::string doing, epilogue_name;  // the case and the plan in work

[[noreturn]] inline void wrong(const Case& c, const std::string& text) {
  throw std::runtime_error(c.name + ": " + text + "\nwith " + doing);
}

inline int64_t index_of(const Shape& shape, int64_t n, int64_t channel, int64_t s) {
  return shape.layout == Layout::channels_first ? (n * shape.C + channel) * shape.S + s
                                                : (n * shape.S + s) * shape.C + channel;
}

// The least number of a type, where it is one that results may come near.
inline double least_of(DType dtype) { return dtype == DType::f16 ? 0x1p-24 : 0; }

// What a result of some size becomes in half precision.
inline double fitting(DType dtype, double want) {
  return dtype == DType::f16 && std::abs(want) > 65500 ? INFINITY : want;
}

// |got - want| <= relative * (|want| + scale); where no number is due, any infinity or NaN will do.
inline void expect(const Case& c, const char* what, int64_t i, double got, double want, double relative,
                   double scale = 0, double slack = 0) {
  const double allowed = relative * (std::abs(want) + scale + slack) + slack;
  if (std::isfinite(want) ? std::abs(got - want) <= allowed : !std::isfinite(got)) return;
  std::ostringstream text;
  text.precision(17);
  text << what << "[" << i << "] is " << got << ", should be " << want;
  wrong(c, text.str());
}

// Rounding to the type of the result, and sums in float (double for double): measured errors are below half of it.
inline double tolerance(DType of_result, DType of_values) {
  return epsilon(of_result) + (of_values == DType::f64 ? 1e-13 : 4e-6);
}

inline Tensor random_tensor(const Case& c, double base) {
  const Shape& shape = c.problem.shape;
  Tensor t(c.problem.dtype, shape.elements(), c.misaligned);
  for (int64_t channel = 0; channel < shape.C; ++channel) {
    const double center = base * double(channel % 7 - 3), width = 0.5 + double(channel % 3);
    for (int64_t n = 0; n < shape.N; ++n) {
      for (int64_t s = 0; s < shape.S; ++s) t.set(index_of(shape, n, channel, s), center + width * noise());
    }
  }
  return t;
}

inline Tensor random_param(const Case& c, int64_t kind) {
  if (kind == 0) return {};
  Tensor t(kind == 1 ? DType::f32 : c.problem.dtype, c.problem.shape.C);
  for (int64_t i = 0; i < t.count(); ++i) t.set(i, i == 1 ? 0 : noise());
  return t;
}

inline std::vector<double> values_of(const Tensor& t, const Shape& shape, int64_t channel) {
  std::vector<double> values;
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t s = 0; s < shape.S; ++s) values.push_back(t.get(index_of(shape, n, channel, s)));
  }
  return values;
}

struct Statistics {
  double mean, var;
};
// In long double: sums of double in turn are worse than the kernels'.
inline Statistics statistics_of(const std::vector<double>& values) {
  long double sum = 0, squares = 0;
  for (double v : values) sum += v;
  const long double n = values.size(), mean = sum / n;
  for (double v : values) squares += (v - mean) * (v - mean);
  return {double(mean), double(squares / n)};
}

}  // namespace driver
