// Conversions between a 16-byte vector, or one element, and the accumulation type.
#pragma once

#include <type_traits>

#include "../core/scalar.h"
#include "device.cuh"

namespace fastbn::cuda {

template <class T>
constexpr int full_vector = int(16 / sizeof(T));

// The register image of one access: V elements of T.
template <class T, int V>
using Raw = std::conditional_t<V == 1, T, Bytes16>;

FASTBN_D void widen_word(uint32_t word, BFloat16*, float* out) {
  out[0] = detail::bits_float(word << 16);
  out[1] = detail::bits_float(word & 0xffff0000u);
}
FASTBN_D uint32_t narrow_word(BFloat16*, const float* in) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
#else
  return from_acc<BFloat16>(in[0]).bits | uint32_t(from_acc<BFloat16>(in[1]).bits) << 16;
#endif
}
FASTBN_D void widen_word(uint32_t word, Half*, float* out) {
#if defined(__CUDA_ARCH__)
  __half2 pair;
  memcpy(&pair, &word, 4);
  const float2 wide = __half22float2(pair);
  out[0] = wide.x, out[1] = wide.y;
#else
  out[0] = to_acc(Half{uint16_t(word)});
  out[1] = to_acc(Half{uint16_t(word >> 16)});
#endif
}
FASTBN_D uint32_t narrow_word(Half*, const float* in) {
#if defined(__CUDA_ARCH__)
  const __half2 pair = __floats2half2_rn(in[0], in[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
#else
  return from_acc<Half>(in[0]).bits | uint32_t(from_acc<Half>(in[1]).bits) << 16;
#endif
}

FASTBN_D void widen_word(uint32_t word, float*, float* out) { out[0] = detail::bits_float(word); }
FASTBN_D uint32_t narrow_word(float*, const float* in) { return detail::float_bits(in[0]); }

template <class T, int V>
FASTBN_D void widen(const Raw<T, V>& raw, acc_t<T> (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = to_acc(raw);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_word(raw.word[i], static_cast<T*>(nullptr), out + 2 * i);
  } else {
    memcpy(out, &raw, 16);
  }
}

template <class T, int V>
FASTBN_D Raw<T, V> narrow(const acc_t<T> (&in)[V]) {
  if constexpr (V == 1) {
    return from_acc<T>(in[0]);
  } else {
    Bytes16 raw;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.word[i] = narrow_word(static_cast<T*>(nullptr), in + 2 * i);
    } else {
      memcpy(&raw, in, 16);
    }
    return raw;
  }
}

}  // namespace fastbn::cuda
