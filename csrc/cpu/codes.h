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

// The states of up to kPiece elements; bit k of kNeverNegative says it of state k.
template <int kStates, unsigned kNeverNegative>
class FloatStates {
 public:
  alignas(64) float of[kStates][kPiece];

  RECAP_INLINE void load(const MixedArrays& all) {
    each_state<0>([&](auto k) { load<k()>(all); });
  }

  template <typename C>
  RECAP_INLINE void store(const MixedArrays& all, C chances) {
    const int64_t size = all.arrays.size;
    for (int64_t begin = 0; begin < size; begin += kElementsOfScale) {
      float inverse[kStates];
      for (int k = 0; k < kStates; ++k) {
        float& scale = all.scale[k][begin / kElementsOfScale];
        scale = scale_of(largest_bits(of[k] + begin), !(kNeverNegative >> k & 1));
        inverse[k] = 1.0f / scale;
      }
      const int64_t end = begin + kElementsOfScale < size ? begin + kElementsOfScale : size;
      if (end - begin == kElementsOfScale) {
        store_block(all, chances, begin, inverse);
      } else {
        store_rest(all, chances, begin, inverse);
      }
      for (int k = 0; k < kStates; ++k) {
        if (inverse[k] == inverse[k]) continue;  // else `code_of` is 0
        memset(static_cast<uint8_t*>(all.arrays.state[k]) + begin, 0, end - begin);
      }
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

  // Behind them, zeros up to the end of the block.
  template <int k>
  RECAP_INLINE void load(const MixedArrays& all) {
    const auto* const codes = static_cast<const uint8_t*>(all.arrays.state[k]);
    const int64_t size = all.arrays.size;
    int64_t i = 0;
#pragma GCC unroll 1
    for (; i + N <= size; i += N) {
      write(of[k] + i, load_codes<is_signed<k>>(codes + i, all.scale[k][i / kElementsOfScale]).v);
    }
    for (; i < size; ++i) {
      of[k][i] = load_code(codes[i], is_signed<k>, all.scale[k][i / kElementsOfScale]);
    }
    for (; i % kElementsOfScale != 0; ++i) of[k][i] = 0;
  }

  static RECAP_INLINE uint32_t largest_bits(const float* values) {
    Words found{};
    for (int i = 0; i < kElementsOfScale; i += N) {
      const Words bits = read<Words>(values + i) & 0x7fffffffu;
      found = bits > found ? bits : found;
    }
    return largest_of<N>(found);
  }

  template <typename C>
  RECAP_INLINE void store_block(const MixedArrays& all, C& chances, int64_t begin,
                                const float* inverse) {
#pragma GCC unroll 1
    for (int64_t i = begin; i < begin + kElementsOfScale; i += N) {
      store_vector(chances, i, inverse, [&](int k, Words codes) __attribute__((always_inline)) {
        store_bytes<N>(codes, static_cast<uint8_t*>(all.arrays.state[k]) + i);
      });
    }
  }

  // Of a block that is not whole.
  template <typename C>
  RECAP_INLINE void store_rest(const MixedArrays& all, C& chances, int64_t begin,
                               const float* inverse) {
#pragma GCC unroll 1
    for (int64_t i = begin; i < all.arrays.size; i += N) {
      store_vector(chances, i, inverse, [&](int k, Words codes) __attribute__((always_inline)) {
        for (int lane = 0; lane < N && i + lane < all.arrays.size; ++lane) {
          static_cast<uint8_t*>(all.arrays.state[k])[i + lane] = static_cast<uint8_t>(codes[lane]);
        }
      });
    }
  }

  template <typename C, typename Put>
  RECAP_INLINE void store_vector(C& chances, int64_t i, const float* inverse, const Put& put) {
    const typename C::Pair first = chances.random(0);
    typename C::Pair second{};
    if constexpr (kStates > 2) second = chances.random(1);
    chances.go_on();
    each_state<0>([&](auto k) __attribute__((always_inline)) {
      const Words random = k() < 2 ? first.of[k() % 2] : second.of[1];
      const Floats value = read<NativeOf<float, N>>(of[k()] + i);
      put(k(), codes_of<is_signed<k()>>(value, inverse[k()], random));
    });
  }
};

template <unsigned kNeverNegative>
class FloatStates<0, kNeverNegative> {
 public:
  float* of[1];
  void load(const MixedArrays&) {}
  template <typename C>
  void store(const MixedArrays&, C) {}
};

}  // namespace
}  // namespace recap::cpu
