// In: dy of a piece. Out: dz = dy * act'(z), in its place, and written where the gradient of the residual is asked for.
// What kernels of the backward pass are templates of.
#pragma once

#include "ending.cuh"

namespace fastbn::cuda {

// In the place of an activation: one that has a mask.
struct Masked {};

// Act: Identity (dz is dy), Masked, or one of core/activation.h (Any: the one that the arguments name, with a residual if
// there is one), for which z is computed once more from the input.
template <class T, int V, class Act>
struct Gradient {
  using A = acc_t<T>;
  static constexpr bool plain = std::is_same_v<Act, Identity>, masked = std::is_same_v<Act, Masked>;
  static constexpr bool any = std::is_same_v<Act, Any>;
  static constexpr bool recomputes = !plain && !masked;  // it may need z
  using Beside = std::conditional_t<any, Raw<T, V>, std::conditional_t<masked, unsigned, Nothing>>;

  const Backward& args;

  FASTBN_D bool needs_input() const {
    return any ? args.epilogue.activation != Activation::identity : recomputes;
  }

  FASTBN_D Beside load_beside(const Piece& p) const {
    Beside beside{};
    if constexpr (masked) beside = load(static_cast<const uint8_t*>(args.mask) + p.index);
    if constexpr (any) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr && needs_input()) beside = load_piece<T, V>(residual, p);
    }
    return beside;
  }

  // dy becomes dz. z(j): of an element, without its residual.
  template <class Z>
  FASTBN_D void turn(const Beside& beside, A (&dy)[V], const Z& z) const {
    const A param = A(args.epilogue.param);
    if constexpr (masked) {
      scale_blocked(beside, param, dy);
    } else if constexpr (any) {
      if (!needs_input()) return;
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
#pragma unroll
        for (int j = 0; j < V; ++j) dy[j] = F::template backward<Math>(dy[j], sum[j], param);
      });
    } else if constexpr (!plain) {
#pragma unroll
      for (int j = 0; j < V; ++j) dy[j] = Act::template backward<Math>(dy[j], z(j), param);
    }
  }

  FASTBN_D void keep(const Piece& p, const Raw<T, V>& dz) const {
    if constexpr (masked || any) {
      if (args.grad_residual != nullptr) store_piece<T, V>(static_cast<T*>(args.grad_residual), p, dz);
    }
  }

 private:
  // A parameter of zero lets nothing through, not even what is no number.
  static FASTBN_D void scale_blocked(unsigned bits, A param, A (&dy)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A scaled = param == 0 ? A(0) : dy[j] * param;
      dy[j] = (bits >> j & 1) != 0 ? scaled : dy[j];
    }
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
