// Random bits for vectors of elements. Included by sources that are compiled once per instruction
// set, as loops.h is.
#pragma once

#include "../numerics/rounding.h"
#include "vector.h"

namespace recap::cpu {
namespace {

constexpr int N = kLanes<float>;
using Floats = Vector<float, N>;
using Words = NativeOf<uint32_t, N>;

struct Powers {
  alignas(64) uint32_t of_lane[kElementsOfDraw];
};
constexpr Powers make_powers() {
  Powers powers{};
  uint32_t power = 1;
  for (uint32_t& each : powers.of_lane) each = power *= kMultiplier;
  return powers;
}
constexpr Powers kPowers = make_powers();

// The chances of elements that follow each other. In whole parameters, and in nearly all
// shards, the elements of a vector have the same draws.
template <bool kShare>
class Chances {
 public:
  Chances(uint64_t key, uint64_t index) : key_(key), index_(index) {}

  // What one draw gives to a vector, for two arrays: 32 random bits, or the 16 of a chance.
  struct Pair {
    Words of[2];
  };
  RECAP_INLINE Pair random(int number) const {
    Pair all{};
    if constexpr (kShare) {
      const Draw shared = draw(key_, index_, number);
      const Words powers = read<Words>(kPowers.of_lane + index_ % kElementsOfDraw);
      for (int k = 0; k < 2; ++k) all.of[k] = shared.words[k] * powers;
    } else {
      for (int i = 0; i < N; ++i) {
        const Draw own = draw(key_, index_ + i, number);
        const uint32_t power = kPowers.of_lane[(index_ + i) % kElementsOfDraw];
        for (int k = 0; k < 2; ++k) all.of[k][i] = random_bits(own.words[k], power);
      }
    }
    return all;
  }
  RECAP_INLINE Pair drawn(int number) const {
    Pair all = random(number);
    for (Words& each : all.of) each >>= 16;
    return all;
  }
  RECAP_INLINE void go_on() { index_ += N; }

 private:
  const uint64_t key_;
  uint64_t index_;
};

}  // namespace
}  // namespace recap::cpu
