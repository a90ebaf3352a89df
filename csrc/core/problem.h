// Plain data that describes a pass of batch norm; all that kernels and planners see.
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
  DType dtype;        // of input, output and their gradients
  int64_t parts = 1;  // of this size that share the caches: the chunks of ghost batch norm
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
  int64_t* counter;        // of batches, incremented by one; nullptr: not wanted
};

enum class Activation : uint8_t { identity, relu, leaky_relu, relu6, elu, silu, hardswish, gelu, sigmoid, tanh };

// The epilogue: z = normalized input + residual, y = act(z).
struct Epilogue {
  Activation activation;
  double param;          // leaky_relu: the slope below zero; elu: alpha; else 0
  const void* residual;  // in the memory order of the input; nullptr: none
};

// True if one bit per element can replace z in the backward pass.
FASTBN_HD constexpr bool has_mask(Activation a) {
  return a == Activation::relu || a == Activation::leaky_relu || a == Activation::relu6;
}

struct Forward {
  Problem problem;
  const void* input;
  void* output;  // nullptr, in training: only the moments are computed
  Param weight, bias;
  Epilogue epilogue;
  // Output, for activations that have a mask: one bit per element, 1 where the gradient is scaled by param. Backend and
  // plan define the order. nullptr: not wanted.
  void* mask;
  Param mean, var;  // eval: what to normalize with
  // Precomputed statistics: mean and var were reduced over a batch of which this input is a part that was just read.
  bool precomputed_stats;
  double* moments;  // output [2, C]: mean and biased variance; may be nullptr in eval
  Running running;  // training: updated
  bool training;
  double eps;
  void* workspace;
};

struct Backward {
  Problem problem;
  const void* grad_output;
  const void* input;
  void* grad_input;  // nullptr: not wanted
  Param weight, bias;
  Epilogue epilogue;      // as in the forward pass, but no residual if there is a mask
  const void* mask;       // from the forward pass; nullptr: z is recomputed
  void* grad_residual;    // output: dz, in the order of the input; nullptr: not wanted, or it is grad_output
  const double* moments;  // [2, C], from the forward pass
  // Global sums of a batch of which this input is a part: grad_weight and grad_bias of the whole batch, [2, C], and its
  // number of values per channel, [C]. grad_input uses them instead of sums of this part. nullptr: this input is the
  // whole batch.
  const double *global_sums, *global_counts;
  Output grad_weight, grad_bias;
  bool training;
  double eps;
  void* workspace;
};

}  // namespace fastbn
