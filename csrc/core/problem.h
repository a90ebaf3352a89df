// In: what ops.cpp knows of the tensors. Out: plain data, the only thing that kernels and planners see.
#pragma once

#include "platform.h"

namespace fastbn {

enum class DType : uint8_t { f32, f64, f16, bf16 };

FASTBN_HD constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// channels_first: element (n, c, s) at (n * C + c) * S + s. channels_last: at (n * S + s) * C + c.
enum class Layout : uint8_t { channels_first, channels_last };

struct Shape {
  int64_t N;  // samples
  int64_t C;  // channels
  int64_t S;  // positions in one feature map
  Layout layout;

  FASTBN_HD constexpr int64_t per_channel() const { return N * S; }
  FASTBN_HD constexpr int64_t elements() const { return N * C * S; }
};

struct Problem {
  Shape shape;
  DType dtype;  // of input, output and their gradients
};

// A per-channel parameter in its own dtype, or absent (data == nullptr).
struct Param {
  const void* data;
  DType dtype;
};

// A per-channel result, written in its own dtype, or not wanted (data == nullptr).
struct Output {
  void* data;
  DType dtype;
};

// running = (1 - momentum) * running + momentum * batch, the variance unbiased. Not wanted: mean.data == nullptr.
struct Running {
  Output mean, var;
  double momentum;
  const int64_t* batches;  // cumulative average: momentum is 1 / *batches; nullptr otherwise
  int64_t* counter;        // of batches, to be increased by one; nullptr: not wanted
};

struct Forward {
  Problem problem;
  const void* input;
  void* output;
  Param weight, bias;
  Param mean, var;  // eval: what to normalize with
  double* moments;  // [2, C] out: the mean and biased variance used; in eval nullptr where nobody needs them
  Running running;  // training: brought up to date
  bool training;
  double eps;
  void* workspace;
};

struct Backward {
  Problem problem;
  const void* grad_output;
  const void* input;
  void* grad_input;  // nullptr: not asked for
  Param weight;
  const double* moments;  // [2, C], as the forward pass left them
  Output grad_weight, grad_bias;
  bool training;
  double eps;
  void* workspace;
};

}  // namespace fastbn
