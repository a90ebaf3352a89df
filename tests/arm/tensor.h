// Tensors with margins that show what was written outside of them, random values, and a digest of bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "core/dispatch.h"

namespace arm_test {

using namespace fastbn;

// Memory at a multiple of 64 bytes, or one element behind it, between two margins that show what was written outside.
class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t offset = 0) : bytes_(bytes), offset_(offset) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_t(bytes + offset + 2 * margin)) != 0) std::abort();
    base_.reset(static_cast<unsigned char*>(p));
    std::memset(p, 0x5a, size_t(bytes + offset + 2 * margin));
    std::memset(data(), 0xff, size_t(bytes));  // NaN in every type
  }
  unsigned char* data() const { return base_.get() + margin + offset_; }
  int64_t bytes() const { return bytes_; }
  bool margins_hold() const {
    const auto untouched = [](unsigned char c) { return c == 0x5a; };
    return std::all_of(base_.get(), data(), untouched) &&
           std::all_of(data() + bytes_, data() + bytes_ + margin, untouched);
  }

 private:
  static constexpr int64_t margin = 256;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  int64_t bytes_, offset_;
  std::unique_ptr<unsigned char, Free> base_;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t count, bool misaligned = false)
      : dtype_(dtype),
        count_(count),
        memory_(std::make_shared<Memory>(count * size_of(dtype), misaligned ? size_of(dtype) : 0)) {}
  explicit operator bool() const { return memory_ != nullptr; }
  unsigned char* data() const { return memory_ ? memory_->data() : nullptr; }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  Param param() const { return {data(), dtype_}; }
  Output output() const { return {data(), dtype_}; }
  double get(int64_t i) const { return read(param(), i, 0); }
  void set(int64_t i, double value) { write(output(), i, value); }
  bool margins_hold() const { return !memory_ || memory_->margins_hold(); }
  Tensor copy() const {
    Tensor t(dtype_, count_);
    std::memcpy(t.data(), data(), size_t(memory_->bytes()));
    return t;
  }
  bool same_bits(const Tensor& other) const { return std::memcmp(data(), other.data(), size_t(memory_->bytes())) == 0; }

 private:
  DType dtype_ = DType::f32;
  int64_t count_ = 0;
  std::shared_ptr<Memory> memory_;
};

class Digest {
 public:
  // Any NaN counts as the same: processors make different ones.
  void add(const Tensor& t) {
    for (int64_t i = 0; i < t.count(); ++i) {
      const bool none = std::isnan(t.get(i));
      for (int64_t k = 0; k < size_of(t.dtype()); ++k) byte(none ? 0xff : t.data()[i * size_of(t.dtype()) + k]);
    }
  }
  uint64_t value() const { return state_; }

 private:
  void byte(unsigned char b) { state_ = (state_ ^ b) * uint64_t{0x100000001b3}; }
  uint64_t state_ = 0xcbf29ce484222325;
};

class Random {
 public:
  explicit Random(const std::string& name) {
    for (const char c : name) state_ = (state_ ^ uint64_t(uint8_t(c))) * uint64_t{0x100000001b3};
  }
  double uniform() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return double(state_ * 0x2545f4914f6cdd1d >> 11) * 0x1p-53;
  }
  // Variance 1, and never further than 3 from 0.
  double noise() { return 2 * (uniform() + uniform() + uniform()) - 3; }

 private:
  uint64_t state_ = 0xcbf29ce484222325;
};

}  // namespace arm_test
