// How 16-bit parameters, gradients and states are stored: bfloat16 and IEEE half precision,
// converted to float for the update and rounded to nearest even once, on the way back.
//
// Integer arithmetic only, so the bits do not depend on the compiler or on a flush of subnormal
// numbers. A GPU converts half precision by its own instructions, which give the same bits except
// in a NaN and are far fewer. NaN becomes a quiet NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic.h"

namespace recap {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type in which elements stored as T are updated.
template <typename T>
struct Compute {
  using type = T;
};
template <>
struct Compute<BFloat16> {
  using type = float;
};
template <>
struct Compute<Float16> {
  using type = float;
};

RECAP_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

RECAP_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

RECAP_INLINE float load(float value) { return value; }
RECAP_INLINE double load(double value) { return value; }

RECAP_INLINE float load(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

RECAP_INLINE float load(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: the magnitude counts units of 2^-24, which float holds exactly.
  const float value_of_units = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return float_from_bits(sign | float_bits(value_of_units));
#endif
}

RECAP_INLINE void store(float value, float& out) { out = value; }
RECAP_INLINE void store(double value, double& out) { out = value; }

RECAP_INLINE void store(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

RECAP_INLINE void store(float value, Float16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {  // subnormal: round the shifted significand to even
    const uint32_t shift = 126u - (magnitude >> 23);
    const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = significand >> shift;
    const uint32_t rest = significand & ((1u << shift) - 1u);
    const uint32_t halfway = 1u << (shift - 1u);
    half = kept + (rest > halfway || (rest == halfway && (kept & 1u)) ? 1u : 0u);
  } else {
    half = 0u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

}  // namespace recap
