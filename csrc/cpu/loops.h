// The loops that kernels are made of. Included by sources that are compiled once per instruction
// set; everything is in an unnamed namespace, so that no copy can take the place of another. They
// go through elements a vector at a time (vector.h).
#pragma once

#include <cstdint>

#include "../numerics/storage.h"
#include "../plan/step.h"
#include "kernels.h"
#include "vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace recap::cpu {
namespace {

// The arrays of one slot, all of them of `T`.
template <typename T>
struct ArraysOf {
  T* param;
  const T* grad;
  T* state[kMaxStates];
};

// N elements from `i` on.
template <typename Algorithm, int N, typename T, typename Values>
RECAP_INLINE void update_vector(const Values& h, const ArraysOf<T>& arrays, int64_t i) {
  using V = Vector<typename Compute<T>::type, N>;
  V p = load_vector<N>(arrays.param + i);
  V state[kMaxStates];
  // Written out: in a loop, they would not be kept in registers.
  if constexpr (Algorithm::kStates > 0) state[0] = load_vector<N>(arrays.state[0] + i);
  if constexpr (Algorithm::kStates > 1) state[1] = load_vector<N>(arrays.state[1] + i);
  if constexpr (Algorithm::kStates > 2) state[2] = load_vector<N>(arrays.state[2] + i);
  Algorithm::update(h, V(load_vector<N>(arrays.grad + i)), p, state);
  store_vector(p, arrays.param + i);
  if constexpr (Algorithm::kStates > 0) store_vector(state[0], arrays.state[0] + i);
  if constexpr (Algorithm::kStates > 1) store_vector(state[1], arrays.state[1] + i);
  if constexpr (Algorithm::kStates > 2) store_vector(state[2], arrays.state[2] + i);
}

template <typename Algorithm, typename T, typename Values>
RECAP_INLINE void update_one(const Values& h, const ArraysOf<T>& arrays, int64_t i) {
  using C = typename Compute<T>::type;
  C p = load(arrays.param[i]);
  C state[kMaxStates] = {};
  for (int k = 0; k < Algorithm::kStates; ++k) state[k] = load(arrays.state[k][i]);
  Algorithm::update(h, C(load(arrays.grad[i])), p, state);
  store(p, arrays.param[i]);
  for (int k = 0; k < Algorithm::kStates; ++k) store(state[k], arrays.state[k][i]);
}

// What is less than a vector: by narrower ones.
template <typename Algorithm, int N, typename T, typename Values>
RECAP_INLINE void update_rest(const Values& h, const ArraysOf<T>& arrays, int64_t i, int64_t end) {
  constexpr int kFewest = 16 / sizeof(typename Compute<T>::type);
  if constexpr (N < kFewest) {
#pragma GCC unroll 1
    for (; i < end; ++i) update_one<Algorithm>(h, arrays, i);
  } else {
    if (end - i >= N) {
      update_vector<Algorithm, N>(h, arrays, i);
      i += N;
    }
    update_rest<Algorithm, N / 2>(h, arrays, i, end);
  }
}

template <typename Algorithm, typename T, typename Values>
RECAP_INLINE void update_range(const Values& h, const ArraysOf<T>& arrays, int64_t begin,
                               int64_t end) {
  constexpr int N = kLanes<typename Compute<T>::type>;
  int64_t i = begin;
#pragma GCC unroll 1
  for (; i + N <= end; i += N) update_vector<Algorithm, N>(h, arrays, i);
  if (i < end) update_rest<Algorithm, N / 2>(h, arrays, i, end);
}

// Asks for `bytes` of every array, from so far after the element `begin` as is the way.
template <typename Algorithm, typename T>
RECAP_INLINE void ask_ahead(const Arrays& arrays, Way way, int64_t begin, int64_t bytes) {
  const int64_t first = begin * sizeof(T) + way.ahead * kBlockBytes;
  for (int64_t byte = first; byte < first + bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(arrays.grad) + byte);
    __builtin_prefetch(static_cast<const char*>(arrays.param) + byte, 1);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      __builtin_prefetch(static_cast<const char*>(arrays.state[k]) + byte, 1);
    }
  }
}

// Has the gradient of some elements, which are in the first-level cache, be zero from now on.
template <typename T>
RECAP_INLINE void clear_grad(const Arrays& arrays, int64_t begin, int64_t count) {
  memset(const_cast<T*>(static_cast<const T*>(arrays.grad)) + begin, 0, count * sizeof(T));
}

// So much of each stream is updated in turn.
constexpr int64_t kTurnBytes = 512;

// Calls update(first element, elements) for the middle of a long tensor, in a way; what is left of
// the streams comes last.
template <typename Algorithm, typename T, typename Update>
RECAP_INLINE void for_turns(const Arrays& arrays, Way way, const Update& update) {
  constexpr int64_t kTurn = kTurnBytes / sizeof(T);
  const int64_t part = arrays.size / way.streams / kTurn * kTurn;
  const int64_t end = part * way.streams;
  for (int64_t turn = 0; turn < part; turn += kTurn) {
    for (int64_t begin = turn; begin < end; begin += part) {
      if (way.ahead) ask_ahead<Algorithm, T>(arrays, way, begin, kTurnBytes);
      update(begin, kTurn);
    }
  }
  for (int64_t begin = end; begin < arrays.size; begin += kTurn) {
    const int64_t left = arrays.size - begin;
    update(begin, left < kTurn ? left : kTurn);
  }
}

// The same for any tensor, a block at a time, with a request for later memory before each.
template <typename T, typename Update>
RECAP_INLINE void for_blocks(const Arrays& arrays, Prefetch& prefetch, const Update& update) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(T);
  int64_t begin = 0;
  for (; begin + kBlock <= arrays.size; begin += kBlock) {
    prefetch.next_block();
    update(begin, kBlock);
  }
  if (begin == arrays.size) return;
  prefetch.next_block();
  update(begin, arrays.size & (kBlock - 1));
}

// Whether Adam's averages keep more than half of themselves, as with all usual betas.
template <typename T>
RECAP_INLINE bool slow(const AdamValues<T>& h) {
  return h.average > 0 && h.square < T(0.5);
}
template <typename Values>
RECAP_INLINE constexpr bool slow(const Values&) {
  return false;
}

// Adam's loop is compiled twice: where it knows that the averages are slow, the compiler drops what
// the update selects by that, which is much of what is not waiting for a root or a quotient.
template <typename Algorithm, typename T, typename Update>
RECAP_INLINE void with_values(const Values& values, const Update& update) {
  const auto h = values.in<typename Compute<T>::type>().template of<Algorithm>();
  if (slow(h)) {
    update(h);
  } else {
    update(h);
  }
}

[[maybe_unused]] void load_all(const BFloat16* __restrict from, float* __restrict to,
                               int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = load(from[i]);
}

// Half precision is converted by instructions of their own, which the compiler does not find.
[[maybe_unused]] void load_all(const Float16* __restrict from, float* __restrict to, int64_t size) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < (size & ~int64_t{15}); i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xffff, half));
  }
#elif defined(__F16C__)
  for (; i < (size & ~int64_t{7}); i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#elif defined(__aarch64__)
  for (; i < (size & ~int64_t{3}); i += 4) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(from + i));
    vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(half)));
  }
#endif
  for (; i < size; ++i) to[i] = load(from[i]);
}

[[maybe_unused]] void store_all(const float* __restrict from, BFloat16* __restrict to,
                                int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(from[i], to[i]);
}

[[maybe_unused]] void store_all(const float* __restrict from, Float16* __restrict to,
                                int64_t size) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < (size & ~int64_t{15}); i += 16) {
    const __m512 value = _mm512_loadu_ps(from + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  for (; i < (size & ~int64_t{7}); i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__aarch64__)
  for (; i < (size & ~int64_t{3}); i += 4) {
    const float16x4_t half = vcvt_f16_f32(vld1q_f32(from + i));
    vst1_u16(reinterpret_cast<uint16_t*>(to + i), vreinterpret_u16_f16(half));
  }
#endif
  for (; i < size; ++i) store(from[i], to[i]);
}

// A block that is in the cache already.
template <typename Algorithm, typename T>
void update_in_cache(const Values& values, const ArraysOf<T>& arrays, int64_t size) {
  with_values<Algorithm, T>(values, [&](const auto& h) __attribute__((always_inline)) {
    update_range<Algorithm>(h, arrays, 0, size);
  });
}

}  // namespace
}  // namespace recap::cpu
