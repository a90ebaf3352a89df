// Activations and residuals in double, with their slopes, and inputs that are put on the kinks of an activation.
#pragma once

#include "driver_cases.h"

namespace driver {

using namespace fastbn;

struct EpilogueCase {
  const char* name;
  Activation activation;
  double param;
  bool adds, mask;
};
// Each as often as the others, so that every kernel is met soon.
constexpr EpilogueCase epilogues[] = {
    {"relu", Activation::relu, 0, false, false},
    {"relu, mask", Activation::relu, 0, false, true},
    {"add relu", Activation::relu, 0, true, false},
    {"add relu, mask", Activation::relu, 0, true, true},
    {"leaky_relu", Activation::leaky_relu, 0.25, false, false},
    {"add leaky_relu, mask", Activation::leaky_relu, 0.25, true, true},
    {"relu6, mask", Activation::relu6, 0, false, true},
    {"add", Activation::identity, 0, true, false},
    {"relu", Activation::relu, 0, false, false},
    {"elu", Activation::elu, 0.75, false, false},
    {"add relu, mask", Activation::relu, 0, true, true},
    {"add silu", Activation::silu, 0, true, false},
    {"relu6", Activation::relu6, 0, false, false},
    {"add relu", Activation::relu, 0, true, false},
    {"hardswish", Activation::hardswish, 0, false, false},
    {"gelu", Activation::gelu, 0, false, false},
    {"add gelu", Activation::gelu, 0, true, false},
    {"sigmoid", Activation::sigmoid, 0, false, false},
    {"add tanh", Activation::tanh, 0, true, false},
};

inline double act(const EpilogueCase& e, double z) {
  const double six = z + 3 < 0 ? 0 : z + 3 > 6 ? 6 : z + 3;
  switch (e.activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::leaky_relu:
      return z > 0 ? z : z * e.param;
    case Activation::relu6:
      return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::elu:
      return z > 0 ? z : e.param * std::expm1(z);
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::hardswish:
      return z * six / 6;
    case Activation::gelu:
      return z * std::erfc(-z / std::sqrt(2)) / 2;
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-z));
    case Activation::tanh:
      return std::tanh(z);
    default:
      return z;
  }
}

struct Slope {
  double value;
  double slack;  // what it may be off by, because z is near where the slope jumps
};

// error: of z. y: what the forward pass made of it, which tells on what side of a jump it was; in float16 only where it
// did not become zero, and in few digits only where it did not become six.
inline Slope slope(const EpilogueCase& e, double z, double y, double error, DType dtype) {
  const auto near = [&](double at) { return std::abs(z - at) <= error; };
  const bool lost = y == 0 && dtype == DType::f16 && near(0);
  const double sigma = 1 / (1 + std::exp(-z));
  switch (e.activation) {
    case Activation::relu:
      return {y == 0 ? 0.0 : 1.0, lost ? 1.0 : 0.0};
    case Activation::leaky_relu:
      return {y <= 0 ? e.param : 1.0, lost ? 1 - e.param : 0.0};
    case Activation::relu6:
      if (y == 6 && size_of(dtype) == 2 && std::abs(z - 6) <= error + 12 * epsilon(dtype)) return {0, 1};
      return {y == 0 || y == 6 ? 0.0 : 1.0, lost ? 1.0 : 0.0};
    case Activation::elu:
      return {z > 0 ? 1 : e.param * std::exp(z), near(0) ? 1 - e.param : 0};
    case Activation::silu:
      return {sigma * (1 + z * (1 - sigma)), 0};
    case Activation::hardswish:
      return {z < -3 ? 0 : z <= 3 ? z / 3 + 0.5 : 1, near(-3) || near(3) ? 0.5 : 0};
    case Activation::gelu:
      return {std::erfc(-z / std::sqrt(2)) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI), 0};
    case Activation::sigmoid:
      return {sigma * (1 - sigma), 0};
    case Activation::tanh:
      return {1 - std::tanh(z) * std::tanh(z), 0};
    default:
      return {1, 0};
  }
}

// Values of few kinds, and a bias that makes z of one of them zero but for roundings: whether it is above is decided by
// the operations it is made of. given_mean: in eval.
inline void put_on_edge(const Case& c, Tensor& x, const Tensor& weight, Tensor& bias, Tensor& residual,
                        const Tensor* given_mean, const Tensor* given_var, double eps) {
  const Shape& shape = c.problem.shape;
  bias = Tensor(DType::f32, shape.C);
  for (int64_t i = 0; i < shape.C; ++i) {
    std::vector<double> values = values_of(x, shape, i);
    for (double& v : values) v = std::round(v * 2) / 2;
    const Statistics st =
        given_mean == nullptr ? statistics_of(values) : Statistics{given_mean->get(i), given_var->get(i)};
    const double at = values[0];
    const double zero = (at - st.mean) / std::sqrt(st.var + eps) * read(weight.param(), i, 1);
    bias.set(i, std::isfinite(zero) ? -zero : 0);
    for (int64_t k = 0; k < shape.per_channel(); ++k) {
      const int64_t place = index_of(shape, k / shape.S, i, k % shape.S);
      x.set(place, values[size_t(k)]);
      if (residual.data() != nullptr && values[size_t(k)] == at) residual.set(place, 0);
    }
  }
}

}  // namespace driver
