// Stochastic rounding: up or down by chance, so that the mean of many roundings is the number.
//
// The chance is a hash of (seed of the parameter, its step count, index of the element), so that
// rounding is the same wherever and in whatever order elements are updated. Croci et al.,
// "Stochastic rounding: implementation, error analysis and applications" (2022), on why: an average
// with a decay of 0.999, kept in bfloat16 and rounded to nearest, stops moving once it changes by
// less than 1/256 of itself.
//
// Integer arithmetic only, as in storage.h. NaN and infinity stay what they are.
#pragma once

#include <cstdint>

#include "storage.h"

namespace recap {

// The output function of SplitMix64 (Steele et al., 2014).
RECAP_INLINE uint64_t mixed_bits(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

// What the chances of one parameter in one step depend on.
RECAP_INLINE uint64_t rounding_key(uint64_t seed, uint64_t step) {
  return mixed_bits(seed + 0x9e3779b97f4a7c15u * step);
}

// So many elements in a row, from a multiple of it on, share a draw of two words. There are two
// draws: the first is for states 0 and 1, the second for the parameter and state 2.
constexpr int kElementsOfDraw = 16;

struct Draw {
  uint32_t words[2];
};

// That of the element with this index in the whole parameter.
RECAP_INLINE Draw draw(uint64_t key, uint64_t index, int number) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t place = 2 * (index / kElementsOfDraw + 1) + number;
  const uint64_t bits = mixed_bits(key + kGolden * place);
  return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}};
}

// Each element of a draw has another state of a multiplicative generator, which the word seeds; the
// multiplier is from L'Ecuyer, "Tables of linear congruential generators of different sizes and
// good lattice structure" (1999).
constexpr uint32_t kMultiplier = 747796405u;

// What the words are multiplied by for the element with this index.
RECAP_INLINE uint32_t power_of_multiplier(uint64_t index) {
  uint32_t power = kMultiplier, factor = kMultiplier;
  for (uint32_t left = index % kElementsOfDraw; left; left >>= 1, factor *= factor) {
    if (left & 1u) power *= factor;
  }
  return power;
}

// 32 random bits, of which the lower ones are less so; and 16.
RECAP_INLINE uint32_t random_bits(uint32_t word, uint32_t power) { return word * power; }
RECAP_INLINE uint32_t chance(uint32_t word, uint32_t power) {
  return random_bits(word, power) >> 16;
}

// Rounds up with a chance that is exact, by adding `chance`, 16 random bits, to what falls off. NaN
// must be a quiet one, as of any arithmetic.
RECAP_INLINE void store(float value, uint32_t chance, BFloat16& out) {
  out.bits = static_cast<uint16_t>((float_bits(value) + (value == value ? chance : 0u)) >> 16);
}

// The same: `chance` is added to what falls off, and the sum cut. Below 2^-14, where 2^-24 is the
// last place, the upper 14 bits of it are: then what has no more than that stays exactly as it is.
RECAP_INLINE void store(float value, uint32_t chance, Float16& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float added = static_cast<float>(static_cast<int32_t>(chance >> 2)) * 0x1p-38f;
  const float small = float_from_bits(magnitude) + added;
  const bool is_normal = magnitude >= 0x38800000u;
  const uint32_t sum = is_normal ? magnitude + (chance >> 3) : float_bits(small);
  const float units = (is_normal ? 0.0f : small) * 0x1p24f;
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(units));
  uint32_t half = is_normal ? (sum - 0x38000000u) >> 13 : subnormal;
  half = half < 0x7c00u ? half : 0x7c00u;
  out.bits = static_cast<uint16_t>(sign | (value != value ? 0x7e00u : half));
}

// A bfloat16 parameter and what its float32 has more: the float is rounded to nearest, ties away
// from zero, and the rest is a signed distance, in units of the float's last place.
RECAP_INLINE float load(BFloat16 value, int16_t remainder) {
  // Of a parameter that somebody has set to zero, the distance is from what it was before.
  const bool is_stale = (value.bits & 0x7fffu) == 0 && remainder < 0;
  const uint32_t distance = is_stale ? 0u : static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return float_from_bits((static_cast<uint32_t>(value.bits) << 16) + distance);
}

RECAP_INLINE void store(float value, BFloat16& out, int16_t& remainder) {
  const uint32_t bits = value != value ? 0x7fc00000u : float_bits(value);
  out.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  remainder = static_cast<int16_t>(static_cast<uint16_t>(bits));
}

// A float16 parameter beside a float32 that it is rounded from: what somebody has set it to since,
// if it is another number.
RECAP_INLINE float load(Float16 value, float master) {
  Float16 rounded;
  store(master, rounded);
  return rounded.bits == value.bits ? master : load(value);
}

}  // namespace recap
