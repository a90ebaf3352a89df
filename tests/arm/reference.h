// The cases of the driver, activations and their derivatives in double, and the comparison with them.
#pragma once

#include <cmath>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace arm_test {

// ---- cases ---------------------------------------------------------------------------------------------------------

// global: training with statistics of a batch that is spread over ranks.
enum class Mode { train, eval, global };
inline const char* const mode_names[] = {"train", "eval", "global"};
inline const char* const dtype_names[] = {"f32", "f64", "f16", "bf16"};

// Of 128 bits everywhere, so that what inputs are made from has the same bits, too.
#if defined(__x86_64__)
using Wide = __float128;
#else
using Wide = long double;
#endif

struct EpilogueCase {
  const char* name;
  Activation activation;
  double param;
  bool adds, mask;
  bool calls_libm;  // in double: the C library's functions, which differ between versions
};
constexpr EpilogueCase epilogues[] = {
    {"identity", Activation::identity, 0, false, false, false},
    {"relu", Activation::relu, 0, false, false, false},
    {"add+relu+mask", Activation::relu, 0, true, true, false},
    {"gelu", Activation::gelu, 0, false, false, true},
    {"add", Activation::identity, 0, true, false, false},
    {"relu+mask", Activation::relu, 0, false, true, false},
    {"add+silu", Activation::silu, 0, true, false, true},
    {"add+relu", Activation::relu, 0, true, false, false},
    {"leaky_relu", Activation::leaky_relu, 0.25, false, false, false},
    {"add+leaky_relu+mask", Activation::leaky_relu, 0.25, true, true, false},
    {"relu6", Activation::relu6, 0, false, false, false},
    {"add+relu6+mask", Activation::relu6, 0, true, true, false},
    {"elu", Activation::elu, 0.75, false, false, true},
    {"silu", Activation::silu, 0, false, false, true},
    {"hardswish", Activation::hardswish, 0, false, false, false},
    {"add+hardswish", Activation::hardswish, 0, true, false, false},
    {"sigmoid", Activation::sigmoid, 0, false, false, true},
    {"add+tanh", Activation::tanh, 0, true, false, true},
};
constexpr int number_of_epilogues = sizeof(epilogues) / sizeof(*epilogues);

// Wide maps are rows; small maps, (N, C) and channels_last are columns: with whole vectors and partial ones, rows
// narrower than a vector, rows made of several and what is left of them, several batch splits.
struct ShapeCase {
  int64_t N, C, S;
};
constexpr ShapeCase shapes[] = {
    {2, 3, 1024}, {2, 2, 4227}, {1, 1, 9001}, {3, 5, 9}, {4, 16, 49}, {2, 33, 196}, {2, 6, 64},
    {64, 24, 1},  {33, 65, 1},  {300, 7, 1},  {5, 1, 3}, {2, 1, 2},   {130, 40, 4}, {2, 520, 25},
};

struct Case {
  Shape shape;
  DType dtype;
  Mode mode;
  const EpilogueCase& epilogue;
  bool streams;      // outputs past the cache, as if the tensors were larger than it
  bool misaligned;   // tensors begin one element behind a multiple of 64 bytes
  bool not_numbers;  // a NaN in the last channel
  int64_t params;    // of weight and bias: 0 absent, 1 float32, 2 as the data

  std::string name() const {
    std::ostringstream s;
    s << mode_names[int(mode)] << "/" << shape.N << "x" << shape.C << "x" << shape.S
      << (shape.layout == Layout::channels_first ? "/first/" : "/last/") << dtype_names[int(dtype)] << "/"
      << epilogue.name << (streams ? "/streams" : "") << (misaligned ? "/misaligned" : "")
      << (not_numbers ? "/nan" : "")
      << (params == 0   ? "/no-params"
          : params == 1 ? "/f32-params"
                        : "")
      << (dtype == DType::f64 && epilogue.calls_libm ? "/libm" : "");
    return s.str();
  }
};

inline int64_t index_of(const Shape& shape, int64_t channel, int64_t k) {
  const int64_t n = k / shape.S, s = k % shape.S;
  return shape.layout == Layout::channels_first ? (n * shape.C + channel) * shape.S + s
                                                : (n * shape.S + s) * shape.C + channel;
}

// ---- activations ---------------------------------------------------------------------------------------------------

inline double act(const EpilogueCase& e, double z) {
  switch (e.activation) {
    case Activation::relu:
      return z > 0 ? z : 0;
    case Activation::leaky_relu:
      return z > 0 ? z : z * e.param;
    case Activation::relu6:
      return std::fmin(std::fmax(z, 0), 6);
    case Activation::elu:
      return z > 0 ? z : e.param * std::expm1(z);
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::hardswish:
      return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    case Activation::gelu:
      return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-z));
    case Activation::tanh:
      return std::tanh(z);
    default:
      return z;
  }
}

inline double act_slope(const EpilogueCase& e, double z) {
  const double sigma = 1 / (1 + std::exp(-z));
  switch (e.activation) {
    case Activation::relu:
      return z > 0;
    case Activation::leaky_relu:
      return z > 0 ? 1 : e.param;
    case Activation::relu6:
      return z > 0 && z < 6;
    case Activation::elu:
      return z > 0 ? 1 : e.param * std::exp(z);
    case Activation::silu:
      return sigma * (1 + z * (1 - sigma));
    case Activation::hardswish:
      return z < -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1;
    case Activation::gelu:
      return std::erfc(-z / std::sqrt(2.0)) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    case Activation::sigmoid:
      return sigma * (1 - sigma);
    case Activation::tanh:
      return 1 / (std::cosh(z) * std::cosh(z));
    default:
      return 1;
  }
}

// Where the derivative jumps: on which side of it a rounded z lies is nobody's error, so dy is zero there.
inline bool near_a_jump(const EpilogueCase& e, double z, double size) {
  const auto near = [&](double at) { return std::abs(z - at) < 1e-4 * (1 + size); };
  switch (e.activation) {
    case Activation::relu:
    case Activation::leaky_relu:
    case Activation::elu:
      return near(0);
    case Activation::relu6:
      return near(0) || near(6);
    case Activation::hardswish:
      return near(-3) || near(3);
    default:
      return false;
  }
}

// ---- comparison ----------------------------------------------------------------------------------------------------

// Of half a unit in the last place.
inline double unit(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}
// Of the arithmetic: float16 and bfloat16 are computed with in float.
inline double unit_of_arithmetic(DType dtype) { return dtype == DType::f64 ? 0x1p-53 : 0x1p-24; }

// What a result may be off by, in units of the arithmetic times the size of what it was made of, beside the rounding to
// its own type: for float32 and float16, bfloat16, float64. About twice what was found, which main prints; float64's
// reference has errors of the same size as the kernels'.
struct Allowed {
  double f32, bf16, f64;
};
inline const std::map<std::string, Allowed> allowed_units = {
    {"mean", {0.25, 1, 8}},     {"var", {0.25, 16, 32}},       {"running", {1, 8, 4}},     {"y", {4, 4, 16}},
    {"grad_input", {4, 4, 32}}, {"grad_residual", {4, 4, 16}}, {"grad_weight", {1, 2, 4}}, {"grad_bias", {1, 1, 4}},
};

inline std::map<std::string, double> largest;  // by kind of result and type

struct Wrong : std::runtime_error {
  using runtime_error::runtime_error;
};

// size: of the numbers that `want` is a sum of.
inline void expect(const Case& c, const char* what, DType of_result, int64_t channel, int64_t k, double got,
                   double want, double size) {
  if (std::isnan(want) || std::isinf(want)) {
    if (std::isfinite(got)) throw Wrong(std::string(what) + " is a number where there is none");
    return;
  }
  const double rounding = unit(of_result) * std::abs(want) + (of_result == DType::f16 ? 0x1p-25 : 0);
  const double rest = std::max(0.0, std::abs(got - want) - rounding);
  const double units = rest == 0 ? 0 : rest / (unit_of_arithmetic(c.dtype) * size);
  const Allowed& allowed = allowed_units.at(what);
  if (units <= (c.dtype == DType::f64 ? allowed.f64 : c.dtype == DType::bf16 ? allowed.bf16 : allowed.f32)) {
    double& most = largest[std::string(what) + " " + dtype_names[int(c.dtype)]];
    most = std::max(most, units);
    return;
  }
  std::ostringstream s;
  s.precision(17);
  s << what << " of channel " << channel << ", element " << k << ", is " << got << ", should be " << want << ": "
    << units << " units off";
  throw Wrong(s.str());
}

}  // namespace arm_test
