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
  int64_t* counter;        // of batches, to be increased by one; nullptr: not wanted
};

enum class Activation : uint8_t { identity, relu, leaky_relu, relu6, elu, silu, hardswish, gelu, sigmoid, tanh };

// What batch norm ends with: z = normalized input + residual, y = act(z).
struct Epilogue {
  Activation activation;
  double param;          // leaky_relu: the slope below zero; elu: alpha; else 0
  const void* residual;  // in the order of the input; nullptr: none
};

// True if a mask of one bit an element can stand for z in the backward pass.
FASTBN_HD constexpr bool has_mask(Activation a) {
  return a == Activation::relu || a == Activation::leaky_relu || a == Activation::relu6;
}

struct Forward {
  Problem problem;
  const void* input;
  void* output;  // nullptr, in training: nothing but moments is made
  Param weight, bias;
  Epilogue epilogue;
  // Out, for activations that have one: a bit an element, 1 where its gradient is scaled by param. Backend and plan
  // decide the order. nullptr: not wanted.
  void* mask;
  Param mean, var;  // eval: what to normalize with
  // They are of a batch that is spread over ranks, of which this is a part that has just been read for them.
  bool spread;
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
  Param weight, bias;
  Epilogue epilogue;      // as in the forward pass; without the residual where there is a mask
  const void* mask;       // as the forward pass left it; nullptr: z is computed once more
  void* grad_residual;    // out: dz, in the order of the input; nullptr: not asked for, or the same as grad_output
  const double* moments;  // [2, C], as the forward pass left them
  // Of a batch that is spread over ranks: [2, C], what grad_weight and grad_bias are in all of them together, and [C],
  // the values that a channel has there. grad_input is made with these, and nothing is summed. nullptr: it is all here.
  const double *total, *counts;
  Output grad_weight, grad_bias;
  bool training;
  double eps;
  void* workspace;
};

}  // namespace fastbn
