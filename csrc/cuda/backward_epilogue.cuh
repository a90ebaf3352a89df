// The epilogue of the backward pass: dz = dy * act'(z), also stored as the gradient of the residual if that is wanted.
// A template parameter of backward kernels.
#pragma once

#include "epilogue.cuh"

namespace fastbn::cuda {

// Stands for any activation with a mask.
struct Masked {};

// Act: Identity (dz is dy), Masked, Relu, or Any: the activation of the arguments, with a residual if there is one. The
// last two recompute z from the input.
template <class T, int V, class Act>
struct BackwardEpilogue {
  using A = acc_t<T>;
  static constexpr bool plain = std::is_same_v<Act, Identity>, masked = std::is_same_v<Act, Masked>;
  static constexpr bool any = std::is_same_v<Act, Any>;
  static constexpr bool recomputes = !plain && !masked;  // may need z
  using Extra = std::conditional_t<any, Raw<T, V>, std::conditional_t<masked, unsigned, Nothing>>;

  const Backward& args;

  FASTBN_D bool needs_input() const { return any ? args.epilogue.activation != Activation::identity : recomputes; }

  FASTBN_D Extra load_extra(const VectorSpan& p) const {
    Extra extra{};
    if constexpr (masked) extra = load(static_cast<const uint8_t*>(args.mask) + p.index);
    if constexpr (any) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr && needs_input()) extra = load_span<T, V>(residual, p);
    }
    return extra;
  }

  // Returns dz in storage format and sets its elements. z(j): element j before the residual is added.
  template <class Z>
  FASTBN_D Raw<T, V> apply(const Extra& extra, const Raw<T, V>& dy, const Z& z, A (&dz)[V]) const {
    Raw<T, V> raw = dy;
    if constexpr (masked) raw = block(extra, dy);
    widen<T, V>(raw, dz);
    if constexpr (any) {
      if (needs_input()) {
        scale(extra, z, dz);
        raw = narrow<T, V>(dz);
      }
    } else if constexpr (recomputes) {
#pragma unroll
      for (int j = 0; j < V; ++j) dz[j] = Act::template backward<Math>(dz[j], z(j), A(0));
      raw = narrow<T, V>(dz);
    }
    return raw;
  }

  // grad_residual may be dy: each element is read by the thread that writes it, and masking twice is the same as once.
  FASTBN_D void store_residual_grad(const VectorSpan& p, const Raw<T, V>& dz) const {
    if constexpr (masked || any) {
      if (args.grad_residual != nullptr) store_span<T, V>(static_cast<T*>(args.grad_residual), p, dz);
    }
  }

 private:
  // Word by word in storage format, which takes the fewest registers. A parameter of zero blocks NaN and infinity too.
  FASTBN_D Bytes16 block(unsigned bits, Bytes16 dy) const {
    const float param = float(args.epilogue.param);
    constexpr int of_word = V / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i, bits >>= of_word) {
      const uint32_t first = 0u - (bits & 1), second = 0u - (bits >> 1 & 1);
      const uint32_t blocked = of_word == 1 ? first : (first & 0xffffu) | (second & 0xffff0000u);
      uint32_t scaled = 0;
      if (param != 0) {
        float value[of_word];
        widen_word(dy.word[i], static_cast<T*>(nullptr), value);
#pragma unroll
        for (int j = 0; j < of_word; ++j) value[j] *= param;
        scaled = narrow_word(static_cast<T*>(nullptr), value);
      }
      dy.word[i] = (dy.word[i] & ~blocked) | (scaled & blocked);
    }
    return dy;
  }

  template <class Z>
  FASTBN_D void scale(const Extra& extra, const Z& z, A (&dy)[V]) const {
    A sum[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = z(j);
    if (args.epilogue.residual != nullptr) {
      A residual[V];
      widen<T, V>(extra, residual);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += residual[j];
    }
    dispatch_activation(args.epilogue.activation, [&](auto act) {
      using F = decltype(act);
      const A param = A(args.epilogue.param);
#pragma unroll
      for (int j = 0; j < V; ++j) dy[j] = F::template backward<Math>(dy[j], sum[j], param);
    });
  }
};

// Calls body(Type<BackwardEpilogue>).
template <class T, int V, class Body>
void dispatch_backward_epilogue(const Backward& args, const Body& body) {
  const Activation activation = args.epilogue.activation;
  if constexpr (masks<T, V>) {
    if (args.mask != nullptr) return body(Type<BackwardEpilogue<T, V, Masked>>{});
  }
  const bool alone = args.epilogue.residual == nullptr && args.grad_residual == nullptr;
  if (activation == Activation::identity && args.grad_residual == nullptr) {
    return body(Type<BackwardEpilogue<T, V, Identity>>{});
  }
  if constexpr (masks<T, V>) {
    if (activation == Activation::relu && alone) return body(Type<BackwardEpilogue<T, V, Relu>>{});
  }
  body(Type<BackwardEpilogue<T, V, Any>>{});
}

}  // namespace fastbn::cuda
