// In: dy of a piece. Out: dz = dy * act'(z), written where the gradient of the residual is asked for. What kernels of
// the backward pass are templates of.
#pragma once

#include "ending.cuh"

namespace fastbn::cuda {

// In the place of an activation: one that has a mask.
struct Masked {};

// Act: Identity (dz is dy), Masked, Relu, or Any: what the arguments name, with a residual if there is one. For the
// last two, z is computed once more from the input.
template <class T, int V, class Act>
struct Gradient {
  using A = acc_t<T>;
  static constexpr bool plain = std::is_same_v<Act, Identity>, masked = std::is_same_v<Act, Masked>;
  static constexpr bool any = std::is_same_v<Act, Any>;
  static constexpr bool recomputes = !plain && !masked;  // it may need z
  using Beside = std::conditional_t<any, Raw<T, V>, std::conditional_t<masked, unsigned, Nothing>>;

  const Backward& args;

  FASTBN_D bool needs_input() const { return any ? args.epilogue.activation != Activation::identity : recomputes; }

  FASTBN_D Beside load_beside(const Piece& p) const {
    Beside beside{};
    if constexpr (masked) beside = load(static_cast<const uint8_t*>(args.mask) + p.index);
    if constexpr (any) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr && needs_input()) beside = load_piece<T, V>(residual, p);
    }
    return beside;
  }

  // dz of the elements of dy, and as it is stored. z(j): of an element, without its residual.
  template <class Z>
  FASTBN_D Raw<T, V> turn(const Beside& beside, const Raw<T, V>& dy, const Z& z, A (&dz)[V]) const {
    Raw<T, V> raw = dy;
    if constexpr (masked) raw = block(beside, dy);
    widen<T, V>(raw, dz);
    if constexpr (any) {
      if (needs_input()) {
        scale(beside, z, dz);
        raw = narrow<T, V>(dz);
      }
    } else if constexpr (recomputes) {
#pragma unroll
      for (int j = 0; j < V; ++j) dz[j] = Act::template backward<Math>(dz[j], z(j), A(0));
      raw = narrow<T, V>(dz);
    }
    return raw;
  }

  // It may be where dy is, where blocking twice is the same as once: each element is read by the thread that writes it.
  FASTBN_D void keep(const Piece& p, const Raw<T, V>& dz) const {
    if constexpr (masked || any) {
      if (args.grad_residual != nullptr) store_piece<T, V>(static_cast<T*>(args.grad_residual), p, dz);
    }
  }

 private:
  // Word by word as it is stored, which takes the fewest registers. A parameter of zero lets nothing through, not even
  // what is no number.
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
  FASTBN_D void scale(const Beside& beside, const Z& z, A (&dy)[V]) const {
    A sum[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = z(j);
    if (args.epilogue.residual != nullptr) {
      A residual[V];
      widen<T, V>(beside, residual);
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

// body(Type<Gradient>)
template <class T, int V, class Body>
void dispatch_gradient(const Backward& args, const Body& body) {
  const Activation activation = args.epilogue.activation;
  if constexpr (masks<T, V>) {
    if (args.mask != nullptr) return body(Type<Gradient<T, V, Masked>>{});
  }
  const bool alone = args.epilogue.residual == nullptr && args.grad_residual == nullptr;
  if (activation == Activation::identity && args.grad_residual == nullptr) {
    return body(Type<Gradient<T, V, Identity>>{});
  }
  if constexpr (masks<T, V>) {
    if (activation == Activation::relu && alone) return body(Type<Gradient<T, V, Relu>>{});
  }
  body(Type<Gradient<T, V, Any>>{});
}

}  // namespace fastbn::cuda
