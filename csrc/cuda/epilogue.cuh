// The epilogue of the forward pass: y = act(z + residual), and the mask for the backward pass. A template parameter of
// forward kernels.
#pragma once

#include "../core/dispatch.h"
#include "access.cuh"
#include "math.cuh"

namespace fastbn::cuda {

// Stands for the activation of the arguments, dispatched for each span.
struct Any {};

// The extra operand of a span, if there is none.
struct Nothing {};

// Whether masks are supported: one byte per vector.
template <class T, int V>
constexpr bool masks = V > 1 && sizeof(T) <= 4;

template <class Act>
constexpr bool has_blocked = std::is_same_v<Act, Relu> || std::is_same_v<Act, LeakyRelu> || std::is_same_v<Act, Relu6>;

// Calls body(functor).
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
struct ForwardEpilogue {
  using A = acc_t<T>;
  using Extra = std::conditional_t<adds, Raw<T, V>, Nothing>;
  static constexpr bool with_residual = adds, any = std::is_same_v<Act, Any>;

  const Forward& args;

  FASTBN_D Extra load_extra(const VectorSpan& p) const {
    Extra extra{};
    if constexpr (adds) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr) extra = load_span<T, V>(residual, p, true);
    }
    return extra;
  }

  // Requests what load_extra() will read of the spans of this thread, before the group waits at its barrier.
  template <class Access>
  FASTBN_D void prefetch_extra(Access& access) const {
    if constexpr (adds) {
      const T* const residual = static_cast<const T*>(args.epilogue.residual);
      if (residual != nullptr) prefetch_all(access, residual);
    }
  }

  // Turns z into y.
  FASTBN_D void apply(const VectorSpan& p, const Extra& extra, A (&z)[V]) const {
    if constexpr (adds) {
      if (args.epilogue.residual != nullptr) {
        A residual[V];
        widen<T, V>(extra, residual);
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

// Calls body(Type<ForwardEpilogue>), with few specializations: one for each activation would take an hour to compile.
template <class T, int V, class Body>
void dispatch_epilogue(const Epilogue& epilogue, const Body& body) {
  const bool adds = epilogue.residual != nullptr;
  if (epilogue.activation == Activation::identity && !adds) return body(Type<ForwardEpilogue<T, V, Identity, false>>{});
  if constexpr (masks<T, V>) {
    if (epilogue.activation == Activation::relu) {
      return adds ? body(Type<ForwardEpilogue<T, V, Relu, true>>{}) : body(Type<ForwardEpilogue<T, V, Relu, false>>{});
    }
  }
  body(Type<ForwardEpilogue<T, V, Any, true>>{});
}

}  // namespace fastbn::cuda
