// float16 and bfloat16 storage types, with conversions to float and back (round to nearest even).
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fastbn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The accumulation type of a storage type.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

namespace detail {

FASTBN_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FASTBN_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

}  // namespace detail

FASTBN_HD float to_acc(float x) { return x; }
FASTBN_HD double to_acc(double x) { return x; }
FASTBN_HD float to_acc(BFloat16 x) { return detail::bits_float(uint32_t(x.bits) << 16); }
FASTBN_HD float to_acc(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return detail::bits_float(sign | magnitude | 0x70000000u);  // inf, NaN
  // Read as a float, the exponent is 112 too small; the product also makes subnormals right.
  return detail::bits_float(sign | detail::float_bits(detail::bits_float(magnitude) * 0x1p112f));
}

template <class T>
FASTBN_HD T from_acc(acc_t<T> x) {
  return x;
}
template <>
FASTBN_HD BFloat16 from_acc<BFloat16>(float x) {
  const uint32_t u = detail::float_bits(x);
  if (x != x) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
FASTBN_HD Half from_acc<Half>(float x) {
  const uint32_t u = detail::float_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // subnormal in half: let a float addition round at the right bit
    const float shifted = detail::bits_float(magnitude) + 0.5f;
    return {uint16_t(sign | (detail::float_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace fastbn
