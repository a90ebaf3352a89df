// PTX arithmetic in C++: what the operators of C++ do not do in the same way. Semantics are those of the PTX ISA
// manual.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

namespace ptx {

enum class rounded : uint8_t { rni, rzi, rmi, rpi };

// The bits of one register as those of another type; a narrower type takes the low bits.
template <class To, class From>
To as(From x) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return std::bit_cast<To>(x);
  } else if constexpr (sizeof(To) < sizeof(From)) {
    using Wide = std::conditional_t<sizeof(From) == 8, uint64_t, uint32_t>;
    using Narrow =
        std::conditional_t<sizeof(To) == 1, uint8_t, std::conditional_t<sizeof(To) == 2, uint16_t, uint32_t>>;
    static_assert(sizeof(From) >= 4 && !std::is_same_v<To, bool>);
    return std::bit_cast<To>(static_cast<Narrow>(std::bit_cast<Wide>(x)));
  } else {
    static_assert(std::is_integral_v<To> && std::is_integral_v<From>, "a register is wider than what it is given");
    return static_cast<To>(x);
  }
}

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double double_of(uint64_t bits) { return std::bit_cast<double>(bits); }
// Of registers that were not set: unlikely numbers and NaN.
constexpr uint64_t unset = 0xbadbadbadbadbad1;
constexpr float unset_float = std::bit_cast<float>(0x7fbadbadu);
constexpr double unset_double = std::bit_cast<double>(0x7ffbadbadbadbad0ull);

template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
  }
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return T(a % b);
}
template <class T>
T high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(a) * Wide(b) >> 8 * sizeof(T));
}
template <class T>
T shl(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : T(std::make_unsigned_t<T>(a) << by);
}
template <class T>
T shr(T a, uint32_t by) {
  constexpr uint32_t bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>) return T(a >> std::min(by, bits - 1));
  return by >= bits ? T(0) : T(a >> by);
}
template <class T>
T bfi(T a, T b, uint32_t at, uint32_t count) {
  at &= 255, count &= 255;
  constexpr uint32_t bits = 8 * sizeof(T);
  const T mask = count >= bits ? T(~T(0)) : T((T(1) << count) - 1);
  return at >= bits ? b : T((b & ~T(mask << at)) | T((a & mask) << at));
}
template <class T>
T bfe(T a, uint32_t at, uint32_t count) {
  at &= 255, count &= 255;
  constexpr uint32_t bits = 8 * sizeof(T);
  T out = 0;
  for (uint32_t i = 0; i < bits; ++i) {
    const uint32_t from = std::min(at + (i < count ? i : count - 1), bits - 1);
    const bool sign = std::is_signed_v<T> && count != 0;
    const bool inside = i < count && at + i < bits;
    if (inside || sign) out = T(out | T(T(std::make_unsigned_t<T>(a) >> from & 1) << i));
  }
  return out;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = select >> 4 * i & 15;
    uint32_t byte = uint32_t(both >> 8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
inline uint32_t shf_l(uint32_t low, uint32_t high, uint32_t by, bool wrap) {
  by = wrap ? by & 31 : std::min(by, 32u);
  return uint32_t((uint64_t(high) << 32 | low) << by >> 32);
}
inline uint32_t shf_r(uint32_t low, uint32_t high, uint32_t by, bool wrap) {
  by = wrap ? by & 31 : std::min(by, 32u);
  return uint32_t((uint64_t(high) << 32 | low) >> by);
}

template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return std::min(a, b);
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return std::max(a, b);
}
template <class T>
T saturated(T x) {
  return std::isnan(x) ? T(0) : std::min(T(1), std::max(T(0), x));
}
// a * b + c, rounded down: the product is exact in double, the sum and what it lost are found by two-sum.
inline float fma_down(float a, float b, float c) {
  const double p = double(a) * double(b), s = p + double(c), t = s - p;
  const double lost = (p - (s - t)) + (double(c) - t);
  const float f = float(s);
  if (!std::isfinite(s) || !std::isfinite(f)) return f;
  const bool above = double(f) > s || (double(f) == s && lost < 0);
  return above ? std::nextafter(f, -INFINITY) : f;
}
template <class To, class From>
To to_integer(From x, rounded how) {
  if (std::isnan(x)) return sizeof(To) == 8 ? To(uint64_t(1) << 63) : To(0);
  x = how == rounded::rni   ? std::nearbyint(x)
      : how == rounded::rzi ? std::trunc(x)
      : how == rounded::rmi ? std::floor(x)
                            : std::ceil(x);
  using L = std::numeric_limits<To>;
  if (x <= From(L::min())) return L::min();
  if (x >= From(L::max())) return L::max();
  return To(x);
}

// Approximations of the hardware: the nearest number, or with FASTBN_PTX_APPROX=n one that is up to n units in the last
// place away from it, the same each time for the same number.
inline const int64_t approximate = [] {
  const char* text = std::getenv("FASTBN_PTX_APPROX");
  return text == nullptr ? 0 : std::strtoll(text, nullptr, 0);
}();
template <class T>
T off(T x) {
  if (approximate == 0 || !std::isfinite(x) || x == 0) return x;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const auto bits = std::bit_cast<Bits>(x);
  const uint64_t hash = bits * 0x9e3779b97f4a7c15 >> 20;
  return std::bit_cast<T>(Bits(bits + Bits(int64_t(hash % uint64_t(2 * approximate + 1)) - approximate)));
}
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
// Whole exponents are exact: the exp and tanh of double in CUDA's headers rely on it.
inline float ex2_approx(float x) { return x == std::nearbyint(x) ? std::exp2(x) : off(std::exp2(x)); }
inline float ex2_approx_ftz(float x) { return flushed(ex2_approx(flushed(x))); }
inline float lg2_approx(float x) { return off(std::log2(x)); }
inline float lg2_approx_ftz(float x) { return flushed(off(std::log2(flushed(x)))); }
inline float rcp_approx(float x) { return off(1 / x); }
inline float rcp_approx_ftz(float x) { return flushed(off(1 / flushed(x))); }
inline float tanh_approx(float x) { return off(std::tanh(x)); }
inline float rsqrt_approx(float x) { return off(float(1 / std::sqrt(double(x)))); }
inline double rsqrt_approx(double x) { return off(1 / std::sqrt(x)); }
inline float sqrt_approx(float x) { return off(std::sqrt(x)); }
// rcp.approx.ftz.f64 reads the upper 32 bits of its operand and gives as many.
inline double rcp_approx_ftz(double x) {
  const auto upper = [](double v) { return double_of(std::bit_cast<uint64_t>(v) & 0xffffffff00000000ull); };
  return upper(1 / upper(x));
}

// To bfloat16 and float16: rounded to the nearest, ties to even (rn), or towards zero (rz).
inline uint16_t bfloat_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t bfloat_rz(float x) { return std::isnan(x) ? 0x7fff : uint16_t(std::bit_cast<uint32_t>(x) >> 16); }
inline float of_bfloat(uint16_t x) { return float_of(uint32_t(x) << 16); }
inline uint16_t half_rn(float x) { return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t half_rz(float x) {
  const uint16_t nearest = half_rn(x);
  const bool away = std::abs(float(std::bit_cast<_Float16>(nearest))) > std::abs(x);
  return std::isinf(x) || !away ? nearest : uint16_t(nearest - 1);
}
inline float of_half(uint16_t x) { return float(std::bit_cast<_Float16>(x)); }

}  // namespace ptx
