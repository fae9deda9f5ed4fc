// States of 8 bits: the elements of a block share a scale, and each has a code, which is a small
// floating point number of 4 bits of exponent. The largest code stands for the largest magnitude in
// the block.
//
//  * Of what is never negative: 4 bits of mantissa. Code 0 is zero, and what is not zero is at
//    least code 1: a second moment that becomes zero would make a step as large as eps allows.
//  * Of other states: a sign, and 3 bits of mantissa. What is less than code 1 becomes zero.
//
// To convert takes a few integer operations, since a code is the upper bits of a float. It is
// rounded stochastically, as rounding.h describes. A block with a NaN or an infinity has NaN for
// its scale, and becomes NaN.
#pragma once

#include <cstdint>

#include "rounding.h"

namespace recap {

constexpr int kElementsOfScale = 128;

constexpr float kLargestOfCode = 1.9375f, kLargestOfSignedCode = 1.875f;

// How far from the end of a float's mantissa a code's is, and by how much the upper bits exceed it.
constexpr uint32_t kCodeShift = 19, kCodeBias = 1792;
constexpr uint32_t kSignedCodeShift = 20, kSignedCodeBias = 896;

// Of a block in which the largest magnitude has these bits.
RECAP_INLINE float scale_of(uint32_t largest, bool is_signed) {
  constexpr float kLeast = 0x1p-120f;  // whose reciprocal is finite
  const float part = 1.0f / (is_signed ? kLargestOfSignedCode : kLargestOfCode);
  if (largest >= 0x7f800000u) return float_from_bits(0x7fc00000u);
  const float scale = float_from_bits(largest) * part;
  return scale < kLeast ? kLeast : scale;
}

RECAP_INLINE float load_code(uint8_t code, bool is_signed, float scale) {
  if (!is_signed) {
    const uint32_t bits = (code + kCodeBias) << kCodeShift;
    return float_from_bits(code == 0 ? 0u : bits) * scale;
  }
  const uint32_t size = code & 127u, sign = (code & 128u) << 24;
  const uint32_t bits = (size + kSignedCodeBias) << kSignedCodeShift;
  return float_from_bits(sign | (size == 0 ? 0u : bits)) * scale;
}

// `inverse` is that of the scale; `random`, 32 random bits, of which the upper ones count. 0 if
// there is no scale.
RECAP_INLINE uint8_t code_of(float value, bool is_signed, float inverse, uint32_t random) {
  if (inverse != inverse) return 0;
  const uint32_t bits = float_bits(value * inverse);
  if (!is_signed) {
    const uint32_t upper = (bits + (random >> (32 - kCodeShift))) >> kCodeShift;
    const int32_t code = static_cast<int32_t>(upper - kCodeBias), least = bits != 0;
    return static_cast<uint8_t>(code < least ? least : code > 255 ? 255 : code);
  }
  const uint32_t upper =
      ((bits & 0x7fffffffu) + (random >> (32 - kSignedCodeShift))) >> kSignedCodeShift;
  const int32_t code = static_cast<int32_t>(upper - kSignedCodeBias);
  const uint32_t size = code < 0 ? 0 : code > 127 ? 127 : code;
  return static_cast<uint8_t>(size | (bits >> 24 & 128u));
}

}  // namespace recap
