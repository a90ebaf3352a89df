// In: z of a piece without its residual. Out: y = act(z + residual), and the mask that the backward pass may want. What
// kernels of the forward pass are templates of.
#pragma once

#include "../core/dispatch.h"
#include "math.cuh"
#include "tile.cuh"

namespace fastbn::cuda {

// In the place of an activation: the one that the arguments name, found once a piece.
struct Any {};

// What a thread holds of a piece beside the input, where that is nothing.
struct Nothing {};

// Where a mask is made: one byte a vector.
template <class T, int V>
constexpr bool masks = V > 1 && sizeof(T) <= 4;

template <class Act>
constexpr bool has_blocked = std::is_same_v<Act, Relu> || std::is_same_v<Act, LeakyRelu> || std::is_same_v<Act, Relu6>;

// body(functor)
template <class Act, class Body>
FASTBN_D void with_activation(Activation activation, const Body& body) {
  if constexpr (std::is_same_v<Act, Any>) {
    dispatch_activation(activation, body);
  } else {
    body(Act{});
  }
}

// adds: there may be a residual.
template <class T, int V, class Act, bool adds>
struct Ending {
  using A = acc_t<T>;
  using Beside = std::conditional_t<adds, Raw<T, V>, Nothing>;
  static constexpr bool with_residual = adds, any = std::is_same_v<Act, Any>;

  const Forward& args;

  FASTBN_D Beside load_beside(const Piece& p) const {
    Beside beside{};
    if constexpr (adds) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr) beside = load_piece<T, V>(residual, p, true);
    }
    return beside;
  }

  // z becomes y.
  FASTBN_D void finish(const Piece& p, const Beside& beside, A (&z)[V]) const {
    if constexpr (adds) {
      if (args.epilogue.residual != nullptr) {
        A residual[V];
        widen<T, V>(beside, residual);
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] += residual[j];
      }
    }
    const A param = A(args.epilogue.param);
    with_activation<Act>(args.epilogue.activation, [&](auto act) {
      using F = decltype(act);
      if constexpr (masks<T, V> && has_blocked<F>) {
        if (args.mask != nullptr) {
          unsigned bits = 0;
#pragma unroll
          for (int j = 0; j < V; ++j) bits |= unsigned(F::blocked(z[j], param)) << j;
          store(static_cast<uint8_t*>(args.mask) + p.index, uint8_t(bits));
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = F::template forward<Math>(z[j], param);
    });
  }
};

// body(Type<Ending>), of the fewest that serve: a kernel for each activation would take an hour to compile.
template <class T, int V, class Body>
void dispatch_ending(const Epilogue& epilogue, const Body& body) {
  const bool adds = epilogue.residual != nullptr;
  if (epilogue.activation == Activation::identity && !adds) return body(Type<Ending<T, V, Identity, false>>{});
  if constexpr (masks<T, V>) {
    if (epilogue.activation == Activation::relu) {
      return adds ? body(Type<Ending<T, V, Relu, true>>{}) : body(Type<Ending<T, V, Relu, false>>{});
    }
  }
  body(Type<Ending<T, V, Any, true>>{});
}

}  // namespace fastbn::cuda
