// The loops that load and store states of 8 bits. Included by sources that are compiled once per
// instruction set, as loops.h is.
#pragma once

#include <type_traits>

#include "../numerics/codes.h"
#include "chances.h"
#include "kernels.h"

namespace recap::cpu {
namespace {

// As `load_code` does.
template <bool kSigned>
RECAP_INLINE Floats load_codes(const uint8_t* from, float scale) {
  using Native = NativeOf<float, N>;
  const Words code = load_bytes<N>(from);
  if constexpr (!kSigned) {
    const Words bits = (code + kCodeBias) << kCodeShift;
    return bit_cast<Native>(code == 0 ? Words{} : bits) * scale;
  } else {
    const Words size = code & 127u, sign = (code & 128u) << 24;
    const Words bits = (size + kSignedCodeBias) << kSignedCodeShift;
    return bit_cast<Native>(sign | (size == 0 ? Words{} : bits)) * scale;
  }
}

// As `code_of` does.
template <bool kSigned>
RECAP_INLINE Words codes_of(Floats value, float inverse, Words random) {
  using Signed = NativeOf<int32_t, N>;
  const Words bits = bit_cast<Words>(value.v * inverse);
  if constexpr (!kSigned) {
    const Words upper = (bits + (random >> (32 - kCodeShift))) >> kCodeShift;
    Signed code = bit_cast<Signed>(upper - kCodeBias);
    const Signed least = bit_cast<Signed>(bits < 1u ? bits : Words{} + 1u);
    code = code < least ? least : code;
    return bit_cast<Words>(code > 255 ? Signed{} + 255 : code);
  } else {
    const Words upper =
        ((bits & 0x7fffffffu) + (random >> (32 - kSignedCodeShift))) >> kSignedCodeShift;
    Signed code = bit_cast<Signed>(upper - kSignedCodeBias);
    code = code < 0 ? Signed{} : code;
    return bit_cast<Words>(code > 127 ? Signed{} + 127 : code) | (bits >> 24 & 128u);
  }
}

template <int kCount>
RECAP_INLINE uint32_t largest_of(NativeOf<uint32_t, kCount> each) {
  if constexpr (kCount == 2) {
    return each[0] > each[1] ? each[0] : each[1];
  } else {
    using Half = NativeOf<uint32_t, kCount / 2>;
    Half halves[2];
    memcpy(halves, &each, sizeof halves);
    return largest_of<kCount / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

// The states of a block while they are floats; bit k of kNeverNegative says it of state k.
template <int kStates, unsigned kNeverNegative>
class BlockOfStates {
 public:
  RECAP_INLINE void load(const MixedArrays& all, int64_t i, Floats* state) const {
    each_state<0>([&](auto k) __attribute__((always_inline)) {
      const auto* const codes = static_cast<const uint8_t*>(all.arrays.state[k()]);
      state[k()] = load_codes<is_signed<k()>>(codes + i, *all.scale[k()]);
    });
  }

  RECAP_INLINE void keep(int64_t i, const Floats* state) {
    each_state<0>([&](auto k) __attribute__((always_inline)) {
      write(of_[k()] + i, state[k()].v);
      const Words bits = state[k()].bits() & 0x7fffffffu;
      largest_[k()] = bits > largest_[k()] ? bits : largest_[k()];
    });
  }

  // Has elements from there on be none.
  void end_at(int64_t count) {
    for (int k = 0; k < kStates; ++k) {
      for (int64_t i = count; i < kElementsOfScale; ++i) of_[k][i] = 0;
      largest_[k] = Words{};
      for (int i = 0; i < kElementsOfScale; i += N) {
        const Words bits = read<Words>(of_[k] + i) & 0x7fffffffu;
        largest_[k] = bits > largest_[k] ? bits : largest_[k];
      }
    }
  }

  template <typename C>
  RECAP_INLINE void store(const MixedArrays& all, C chances) const {
    float inverse[kStates];
    each_state<0>([&](auto k) __attribute__((always_inline)) {
      const float scale = scale_of(largest_of<N>(largest_[k()]), is_signed<k()>);
      *all.scale[k()] = scale;
      inverse[k()] = 1.0f / scale;
    });
#pragma GCC unroll 1
    for (int i = 0; i < kElementsOfScale; i += N) {
      const typename C::Pair first = chances.random(0);
      typename C::Pair second{};
      if constexpr (kStates > 2) second = chances.random(1);
      chances.go_on();
      each_state<0>([&](auto k) __attribute__((always_inline)) {
        const Words random = k() < 2 ? first.of[k() % 2] : second.of[1];
        const Floats value = read<NativeOf<float, N>>(of_[k()] + i);
        const Words codes = codes_of<is_signed<k()>>(value, inverse[k()], random);
        store_bytes<N>(codes, static_cast<uint8_t*>(all.arrays.state[k()]) + i);
      });
    }
    for (int k = 0; k < kStates; ++k) {
      if (inverse[k] == inverse[k]) continue;  // else `code_of` is 0
      memset(all.arrays.state[k], 0, kElementsOfScale);
    }
  }

 private:
  template <int k>
  static constexpr bool is_signed = !(kNeverNegative >> k & 1);

  template <int k, typename Visit>
  static RECAP_INLINE void each_state(const Visit& visit) {
    if constexpr (k < kStates) {
      visit(std::integral_constant<int, k>());
      each_state<k + 1>(visit);
    }
  }

  alignas(64) float of_[kStates][kElementsOfScale];
  Words largest_[kStates] = {};
};

}  // namespace
}  // namespace recap::cpu
