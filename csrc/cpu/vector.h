// Vectors of numbers, which take the place of one in an update: as wide as the instruction set has
// them. Included by sources that are compiled once per instruction set; everything is in an unnamed
// namespace, so that no copy can take the place of another.
//
// Left to itself, the compiler reads an array anew after every store to another, and mixes widths
// badly where elements are of 16 bits: a loop over vectors is up to 1.4 times as fast in the cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numerics/arithmetic.h"
#include "../numerics/rounding.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace recap::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename S>
constexpr int kLanes = kVectorBytes / sizeof(S);

template <size_t kBytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

template <typename S, int N>
struct Native {
  typedef S type __attribute__((vector_size(N * sizeof(S))));
};
template <typename S, int N>
using NativeOf = typename Native<S, N>::type;
template <typename S, int N>
using BitsOf = NativeOf<typename Unsigned<sizeof(S)>::type, N>;

template <typename To, typename From>
RECAP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename S, int N>
struct Mask {
  decltype(NativeOf<S, N>{} < NativeOf<S, N>{}) m;
};

template <typename S, int N>
struct Vector {
  NativeOf<S, N> v;

  Vector() = default;
  RECAP_INLINE Vector(NativeOf<S, N> all) : v(all) {}
  RECAP_INLINE explicit Vector(S each) : v(each - NativeOf<S, N>{}) {}

  RECAP_INLINE BitsOf<S, N> bits() const { return bit_cast<BitsOf<S, N>>(v); }
};

#define RECAP_OPERATOR(op)                                                \
  template <typename S, int N>                                            \
  RECAP_INLINE Vector<S, N> operator op(Vector<S, N> a, Vector<S, N> b) { \
    return a.v op b.v;                                                    \
  }                                                                       \
  template <typename S, int N>                                            \
  RECAP_INLINE Vector<S, N> operator op(Vector<S, N> a, S b) {            \
    return a.v op b;                                                      \
  }                                                                       \
  template <typename S, int N>                                            \
  RECAP_INLINE Vector<S, N> operator op(S a, Vector<S, N> b) {            \
    return a op b.v;                                                      \
  }
RECAP_OPERATOR(+)
RECAP_OPERATOR(-)
RECAP_OPERATOR(*)
#undef RECAP_OPERATOR

template <typename S, int N>
RECAP_INLINE Vector<S, N> operator-(Vector<S, N> a) {
  return -a.v;
}

#define RECAP_COMPARISON(op)                                            \
  template <typename S, int N>                                          \
  RECAP_INLINE Mask<S, N> operator op(Vector<S, N> a, Vector<S, N> b) { \
    return {a.v op b.v};                                                \
  }                                                                     \
  template <typename S, int N>                                          \
  RECAP_INLINE Mask<S, N> operator op(Vector<S, N> a, S b) {            \
    return {a.v op b};                                                  \
  }
RECAP_COMPARISON(<)
RECAP_COMPARISON(>)
RECAP_COMPARISON(!=)
#undef RECAP_COMPARISON

template <typename S, int N>
RECAP_INLINE Vector<S, N> select(Mask<S, N> mask, Vector<S, N> a, Vector<S, N> b) {
  return mask.m ? a.v : b.v;
}
template <typename S, int N>
RECAP_INLINE Mask<S, N> both(bool all, Mask<S, N> each) {
  return all ? each : Mask<S, N>{};
}
template <typename S, int N>
RECAP_INLINE Mask<S, N> either(Mask<S, N> a, Mask<S, N> b) {
  return {a.m | b.m};
}

template <typename S, int N>
RECAP_INLINE Vector<S, N> magnitude(Vector<S, N> a) {
  using Bits = typename Unsigned<sizeof(S)>::type;
  return bit_cast<NativeOf<S, N>>(a.bits() & static_cast<Bits>(static_cast<Bits>(-1) >> 1));
}

template <typename S, int N>
RECAP_INLINE Vector<S, N> divide(Vector<S, N> a, Vector<S, N> b) {
  return a.v / b.v;
}

template <typename S, int N>
RECAP_INLINE Vector<S, N> square_root(Vector<S, N> a) {
  constexpr size_t kBytes = N * sizeof(S);
  constexpr bool is_float = sizeof(S) == 4;
  (void)kBytes, (void)is_float;
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && is_float) {
    return bit_cast<NativeOf<S, N>>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(a.v)));
  } else if constexpr (kBytes == 64) {
    return bit_cast<NativeOf<S, N>>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(a.v)));
  } else
#endif
#if defined(__AVX2__)
      if constexpr (kBytes == 32 && is_float) {
    return bit_cast<NativeOf<S, N>>(_mm256_sqrt_ps(bit_cast<__m256>(a.v)));
  } else if constexpr (kBytes == 32) {
    return bit_cast<NativeOf<S, N>>(_mm256_sqrt_pd(bit_cast<__m256d>(a.v)));
  } else
#endif
#if defined(__x86_64__)
      if constexpr (kBytes == 16 && is_float) {
    return bit_cast<NativeOf<S, N>>(_mm_sqrt_ps(bit_cast<__m128>(a.v)));
  } else if constexpr (kBytes == 16) {
    return bit_cast<NativeOf<S, N>>(_mm_sqrt_pd(bit_cast<__m128d>(a.v)));
  } else
#elif defined(__aarch64__)
  if constexpr (kBytes == 16 && is_float) {
    return bit_cast<NativeOf<S, N>>(vsqrtq_f32(bit_cast<float32x4_t>(a.v)));
  } else if constexpr (kBytes == 16) {
    return bit_cast<NativeOf<S, N>>(vsqrtq_f64(bit_cast<float64x2_t>(a.v)));
  } else
#endif
  {
    Vector<S, N> root;
    for (int i = 0; i < N; ++i) root.v[i] = recap::square_root(a.v[i]);
    return root;
  }
}

template <typename S, int N>
RECAP_INLINE Vector<S, N> fma(Vector<S, N> a, Vector<S, N> b, Vector<S, N> c) {
  constexpr size_t kBytes = N * sizeof(S);
  constexpr bool is_float = sizeof(S) == 4;
  (void)kBytes, (void)is_float;
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && is_float) {
    return bit_cast<NativeOf<S, N>>(
        _mm512_fmadd_ps(bit_cast<__m512>(a.v), bit_cast<__m512>(b.v), bit_cast<__m512>(c.v)));
  } else if constexpr (kBytes == 64) {
    return bit_cast<NativeOf<S, N>>(
        _mm512_fmadd_pd(bit_cast<__m512d>(a.v), bit_cast<__m512d>(b.v), bit_cast<__m512d>(c.v)));
  } else
#endif
#if defined(__FMA__)
      if constexpr (kBytes == 32 && is_float) {
    return bit_cast<NativeOf<S, N>>(
        _mm256_fmadd_ps(bit_cast<__m256>(a.v), bit_cast<__m256>(b.v), bit_cast<__m256>(c.v)));
  } else if constexpr (kBytes == 32) {
    return bit_cast<NativeOf<S, N>>(
        _mm256_fmadd_pd(bit_cast<__m256d>(a.v), bit_cast<__m256d>(b.v), bit_cast<__m256d>(c.v)));
  } else if constexpr (kBytes == 16 && is_float) {
    return bit_cast<NativeOf<S, N>>(
        _mm_fmadd_ps(bit_cast<__m128>(a.v), bit_cast<__m128>(b.v), bit_cast<__m128>(c.v)));
  } else if constexpr (kBytes == 16) {
    return bit_cast<NativeOf<S, N>>(
        _mm_fmadd_pd(bit_cast<__m128d>(a.v), bit_cast<__m128d>(b.v), bit_cast<__m128d>(c.v)));
  } else
#elif defined(__aarch64__)
  if constexpr (kBytes == 16 && is_float) {
    return bit_cast<NativeOf<S, N>>(vfmaq_f32(
        bit_cast<float32x4_t>(c.v), bit_cast<float32x4_t>(a.v), bit_cast<float32x4_t>(b.v)));
  } else if constexpr (kBytes == 16) {
    return bit_cast<NativeOf<S, N>>(vfmaq_f64(
        bit_cast<float64x2_t>(c.v), bit_cast<float64x2_t>(a.v), bit_cast<float64x2_t>(b.v)));
  } else
#endif
  {
    Vector<S, N> sum;
    for (int i = 0; i < N; ++i) sum.v[i] = recap::fma(a.v[i], b.v[i], c.v[i]);
    return sum;
  }
}
template <typename S, int N>
RECAP_INLINE Vector<S, N> fma(S a, Vector<S, N> b, Vector<S, N> c) {
  return fma(Vector<S, N>(a), b, c);
}
template <typename S, int N>
RECAP_INLINE Vector<S, N> fma(Vector<S, N> a, S b, S c) {
  return fma(a, Vector<S, N>(b), Vector<S, N>(c));
}

// --- access ------------------------------------------------------------------------------

template <typename T>
RECAP_INLINE T read(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
RECAP_INLINE void write(void* to, T value) {
  memcpy(to, &value, sizeof value);
}

// 16 bits in 32, and back. The compiler takes twice as many instructions for it.
template <int N>
RECAP_INLINE NativeOf<uint32_t, N> widen(NativeOf<uint16_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto wide = _mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits));
    return bit_cast<NativeOf<uint32_t, N>>(wide);
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 8) {
    return bit_cast<NativeOf<uint32_t, N>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
  } else
#endif
  {
    return __builtin_convertvector(bits, NativeOf<uint32_t, N>);
  }
}
template <int N>
RECAP_INLINE NativeOf<uint16_t, N> narrow(NativeOf<uint32_t, N> bits) {  // of less than 2^16
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto half = _mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits));
    return bit_cast<NativeOf<uint16_t, N>>(half);
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 8) {
    const __m256i all = bit_cast<__m256i>(bits);
    return bit_cast<NativeOf<uint16_t, N>>(
        _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  } else
#endif
  {
    return __builtin_convertvector(bits, NativeOf<uint16_t, N>);
  }
}

// 8 bits in 32, and back.
template <int N>
RECAP_INLINE NativeOf<uint32_t, N> load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto wide = _mm512_maskz_cvtepu8_epi32(0xffff, read<__m128i>(from));
    return bit_cast<NativeOf<uint32_t, N>>(wide);
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return bit_cast<NativeOf<uint32_t, N>>(_mm256_cvtepu8_epi32(bytes));
  } else
#endif
  {
    const auto bytes = read<NativeOf<uint8_t, N>>(from);
    return widen<N>(__builtin_convertvector(bytes, NativeOf<uint16_t, N>));
  }
}
template <int N>
RECAP_INLINE void store_bytes(NativeOf<uint32_t, N> bits, uint8_t* to) {  // of less than 2^8
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    write(to, _mm512_maskz_cvtepi32_epi8(0xffff, bit_cast<__m512i>(bits)));
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 8) {
    const auto halves = bit_cast<__m128i>(narrow<N>(bits));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
  } else
#endif
  {
    write(to, __builtin_convertvector(narrow<N>(bits), NativeOf<uint8_t, N>));
  }
}

template <int N>
RECAP_INLINE NativeOf<uint16_t, N> narrow_lower(NativeOf<uint32_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i places = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 30, 28,
                                            26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i halves =
        _mm512_maskz_permutexvar_epi16(0xffffffff, places, bit_cast<__m512i>(bits));
    return read<NativeOf<uint16_t, N>>(&halves);
  } else
#endif
  {
    return narrow<N>(bits & 0xffffu);
  }
}

template <int N>
RECAP_INLINE NativeOf<uint32_t, N> widen_signed(NativeOf<int16_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto wide = _mm512_maskz_cvtepi16_epi32(0xffff, bit_cast<__m256i>(bits));
    return bit_cast<NativeOf<uint32_t, N>>(wide);
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 8) {
    return bit_cast<NativeOf<uint32_t, N>>(_mm256_cvtepi16_epi32(bit_cast<__m128i>(bits)));
  } else
#endif
  {
    return bit_cast<NativeOf<uint32_t, N>>(__builtin_convertvector(bits, NativeOf<int32_t, N>));
  }
}

// The same, but that they are the upper half of the 32.
template <int N>
RECAP_INLINE NativeOf<uint32_t, N> widen_to_upper(NativeOf<uint16_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i places = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return bit_cast<NativeOf<uint32_t, N>>(_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, places, _mm512_castsi256_si512(bit_cast<__m256i>(bits))));
  } else
#endif
  {
    return widen<N>(bits) << 16;
  }
}
template <int N>
RECAP_INLINE NativeOf<uint16_t, N> narrow_upper(NativeOf<uint32_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i places = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29,
                                            27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i halves =
        _mm512_maskz_permutexvar_epi16(0xffffffff, places, bit_cast<__m512i>(bits));
    return read<NativeOf<uint16_t, N>>(&halves);
  } else
#endif
  {
    return narrow<N>(bits >> 16);
  }
}

// `bits`, those of `value`, and `more` where it is a number.
template <int N>
RECAP_INLINE NativeOf<uint32_t, N> add_to_numbers(Vector<float, N> value,
                                                  NativeOf<uint32_t, N> more) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 all = bit_cast<__m512>(value.v);
    const __m512i bits = bit_cast<__m512i>(value.v);
    return bit_cast<NativeOf<uint32_t, N>>(_mm512_mask_add_epi32(
        bits, _mm512_cmp_ps_mask(all, all, _CMP_ORD_Q), bits, bit_cast<__m512i>(more)));
  } else
#endif
  {
    return value.bits() + (value.v == value.v ? more : NativeOf<uint32_t, N>{});
  }
}

template <int N, typename S>
RECAP_INLINE Vector<S, N> load_vector(const S* from) {
  return read<NativeOf<S, N>>(from);
}
template <int N>
RECAP_INLINE Vector<float, N> load_vector(const BFloat16* from) {
  return bit_cast<NativeOf<float, N>>(widen_to_upper<N>(read<NativeOf<uint16_t, N>>(from)));
}
template <int N>
RECAP_INLINE Vector<float, N> load_vector(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bit_cast<NativeOf<float, N>>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from)));
  } else
#endif
#if defined(__F16C__)
      if constexpr (N == 8) {
    return bit_cast<NativeOf<float, N>>(_mm256_cvtph_ps(read<__m128i>(from)));
  } else
#elif defined(__aarch64__)
  if constexpr (N == 4) {
    const uint16x4_t half = read<uint16x4_t>(from);
    return bit_cast<NativeOf<float, N>>(vcvt_f32_f16(vreinterpret_f16_u16(half)));
  } else
#endif
  {
    Vector<float, N> wide;
    for (int i = 0; i < N; ++i) wide.v[i] = load(from[i]);
    return wide;
  }
}

template <int N, typename S>
RECAP_INLINE void store_vector(Vector<S, N> value, S* to) {
  write(to, value.v);
}
template <int N>
RECAP_INLINE void store_vector(Vector<float, N> value, BFloat16* to) {
  const auto bits = value.bits();
  NativeOf<uint32_t, N> rounded = bits + 0x7fffu;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i all = bit_cast<__m512i>(bits), sum = bit_cast<__m512i>(rounded);
    const auto is_odd = _mm512_test_epi32_mask(all, _mm512_set1_epi32(0x10000));
    rounded = bit_cast<NativeOf<uint32_t, N>>(
        _mm512_mask_add_epi32(sum, is_odd, sum, _mm512_set1_epi32(1)));
  } else
#endif
  {
    rounded += (bits >> 16) & 1u;
  }
  const auto nan = NativeOf<uint32_t, N>{} + 0x7fc00000u;
  write(to, narrow_upper<N>(value.v != value.v ? nan : rounded));
}
template <int N>
RECAP_INLINE void store_vector(Vector<float, N> value, Float16* to) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 wide = bit_cast<__m512>(value.v);
    write(to, _mm512_maskz_cvtps_ph(0xffff, wide, _MM_FROUND_TO_NEAREST_INT));
  } else
#endif
#if defined(__F16C__)
      if constexpr (N == 8) {
    write(to, _mm256_cvtps_ph(bit_cast<__m256>(value.v), _MM_FROUND_TO_NEAREST_INT));
  } else
#elif defined(__aarch64__)
  if constexpr (N == 4) {
    write(to, vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(value.v))));
  } else
#endif
  {
    for (int i = 0; i < N; ++i) store(value.v[i], to[i]);
  }
}

}  // namespace
}  // namespace recap::cpu
