// The updates of slots with a format, compiled once per instruction set (RECAP_INSTRUCTION_SET).
//
// There is one loop for each update, not for each format: what a format says is asked before every
// load and store of a vector, and a processor foresees an answer that is always the same.
#include "chances.h"
#include "codes.h"
#include "kernels.h"
#include "loops.h"

namespace recap::cpu {
namespace {

#if defined(__F16C__)
// Cuts bits off, of numbers of less than 2^16.
RECAP_INLINE void store_cut(NativeOf<float, N> value, Float16* to) {
#if defined(__AVX512F__)
  write(to, _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_ZERO));
#else
  write(to, _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_ZERO));
#endif
}
#endif

// As `store` of rounding.h does.
RECAP_INLINE void store_by_chance(Floats value, Words chance, BFloat16* to) {
  write(to, narrow_upper<N>(add_to_numbers(value, chance)));
}
RECAP_INLINE void store_by_chance(Floats value, Words chance, Float16* to) {
  using Signed = NativeOf<int32_t, N>;
  using Native = NativeOf<float, N>;
  const Words bits = value.bits(), magnitude = bits & 0x7fffffffu;
  const Native added = __builtin_convertvector(bit_cast<Signed>(chance >> 2), Native) * 0x1p-38f;
  const Native small = bit_cast<Native>(magnitude) + added;
  const auto is_normal = magnitude >= 0x38800000u;
  Words sum = is_normal ? magnitude + (chance >> 3) : bit_cast<Words>(small);
#if defined(__F16C__)
  sum = sum >= 0x47800000u ? Words{} + 0x7f800000u : sum;
  sum = value.v == value.v ? sum : Words{} + 0x7fc00000u;
  store_cut(bit_cast<Native>(sum | (bits & 0x80000000u)), to);
#else
  const Native units = (is_normal ? Native{} : small) * 0x1p24f;
  const Words subnormal = bit_cast<Words>(__builtin_convertvector(units, Signed));
  Words half = is_normal ? (sum - 0x38000000u) >> 13 : subnormal;
  half = half < 0x7c00u ? half : Words{} + 0x7c00u;
  half = value.v == value.v ? half : Words{} + 0x7e00u;
  write(to, narrow<N>(((bits >> 16) & 0x8000u) | half));
#endif
}

// Adds remainders to what is in the upper half, as `load` of rounding.h does.
RECAP_INLINE Words add_unless_stale(Words high, Words low) {
#if defined(__AVX512F__)
  const __m512i all = bit_cast<__m512i>(high), more = bit_cast<__m512i>(low);
  const __mmask16 is_zero = _mm512_testn_epi32_mask(all, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 is_stale = _mm512_mask_cmplt_epi32_mask(is_zero, more, _mm512_setzero_si512());
  return bit_cast<Words>(_mm512_mask_add_epi32(all, _knot_mask16(is_stale), all, more));
#else
  const auto is_stale = ((high << 1) == 0) & (low >> 31 != 0);
  return high + (is_stale ? Words{} : low);
#endif
}

RECAP_INLINE Floats load_with_remainder(const BFloat16* upper, const int16_t* remainder) {
  const Words high = widen_to_upper<N>(read<NativeOf<uint16_t, N>>(upper));
  const Words low = widen_signed<N>(read<NativeOf<int16_t, N>>(remainder));
  return bit_cast<NativeOf<float, N>>(add_unless_stale(high, low));
}
RECAP_INLINE void store_with_remainder(Floats value, BFloat16* upper, int16_t* remainder) {
  const Words bits = value.v == value.v ? value.bits() : Words{} + 0x7fc00000u;
  write(upper, narrow_upper<N>(bits + 0x8000u));
  write(remainder, narrow_lower<N>(bits));
}

RECAP_INLINE Floats load_as(Dtype dtype, const void* from, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: return load_vector<N>(static_cast<const BFloat16*>(from) + i);
    case Dtype::float16: return load_vector<N>(static_cast<const Float16*>(from) + i);
    default: return load_vector<N>(static_cast<const float*>(from) + i);
  }
}
RECAP_INLINE void store_as(Dtype dtype, Floats value, void* to, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: store_vector(value, static_cast<BFloat16*>(to) + i); return;
    case Dtype::float16: store_vector(value, static_cast<Float16*>(to) + i); return;
    default: store_vector(value, static_cast<float*>(to) + i);
  }
}
RECAP_INLINE void store_as(Dtype dtype, Floats value, Words chance, void* to, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: store_by_chance(value, chance, static_cast<BFloat16*>(to) + i); return;
    case Dtype::float16: store_by_chance(value, chance, static_cast<Float16*>(to) + i); return;
    default: store_vector(value, static_cast<float*>(to) + i);
  }
}

// A format with the dtype of the parameter, known when the loop is compiled or not.
struct AnyFormat : Format {
  Dtype dtype;
};

template <typename F>
RECAP_INLINE Floats load_param(const MixedArrays& all, const F& format, int64_t i) {
  const void* const param = all.arrays.param;
  switch (format.param) {
    case ParamRounding::remainder:
      return load_with_remainder(static_cast<const BFloat16*>(param) + i,
                                 static_cast<const int16_t*>(all.rest) + i);
    case ParamRounding::master: {
      Floats value;
      for (int lane = 0; lane < N; ++lane) {
        value.v[lane] = load(static_cast<const Float16*>(param)[i + lane],
                             static_cast<const float*>(all.rest)[i + lane]);
      }
      return value;
    }
    default: return load_as(format.dtype, param, i);
  }
}
template <typename F>
RECAP_INLINE void store_param(const MixedArrays& all, const F& format, Floats value, Words chance,
                              int64_t i) {
  void* const param = all.arrays.param;
  switch (format.param) {
    case ParamRounding::remainder:
      store_with_remainder(value, static_cast<BFloat16*>(param) + i,
                           static_cast<int16_t*>(all.rest) + i);
      return;
    case ParamRounding::stochastic: store_as(format.dtype, value, chance, param, i); return;
    case ParamRounding::master: store_vector(value, static_cast<float*>(all.rest) + i); break;
    case ParamRounding::nearest: break;
  }
  store_as(format.dtype, value, param, i);
}

template <typename Algorithm, typename H, typename F, typename C>
RECAP_INLINE void update_vector(const H& h, const MixedArrays& all, const F& format, C& chances,
                                int64_t i) {
  Floats param = load_param(all, format, i);
  const Floats grad = load_as(format.grad, all.arrays.grad, i);
  Floats state[kMaxStates];
  // Written out: in a loop, they would not be kept in registers.
  const auto load_state = [&](int k) __attribute__((always_inline)) {
    return load_as(format.state, all.arrays.state[k], i);
  };
  if constexpr (Algorithm::kStates > 0) state[0] = load_state(0);
  if constexpr (Algorithm::kStates > 1) state[1] = load_state(1);
  if constexpr (Algorithm::kStates > 2) state[2] = load_state(2);
  Algorithm::update(h, grad, param, state);
  typename C::Pair first{}, second{};
  if (format.draws_for_states && Algorithm::kStates > 0) first = chances.drawn(0);
  const bool has_third = format.draws_for_states && Algorithm::kStates > 2;
  if (format.param == ParamRounding::stochastic || has_third) second = chances.drawn(1);
  chances.go_on();
  store_param(all, format, param, second.of[0], i);
  const auto store_state = [&](int k, Words chance) __attribute__((always_inline)) {
    if (format.draws_for_states) {
      store_as(format.state, state[k], chance, all.arrays.state[k], i);
    } else {
      store_as(format.state, state[k], all.arrays.state[k], i);
    }
  };
  if constexpr (Algorithm::kStates > 0) store_state(0, first.of[0]);
  if constexpr (Algorithm::kStates > 1) store_state(1, first.of[1]);
  if constexpr (Algorithm::kStates > 2) store_state(2, second.of[1]);
}

// What is less than a vector is filled up with zeros elsewhere.
template <typename Algorithm, typename H>
void update_rest(const H& h, const MixedArrays& all, const AnyFormat& format, int64_t i) {
  const auto count = static_cast<size_t>(all.arrays.size - i);
  alignas(64) char buffers[3 + kMaxStates][N * sizeof(float)] = {};
  struct {
    void* from;
    Dtype dtype;
  } const arrays[] = {
      {all.arrays.param, all.dtype},       {const_cast<void*>(all.arrays.grad), format.grad},
      {all.rest, rest_dtype(format)},      {all.arrays.state[0], format.state},
      {all.arrays.state[1], format.state}, {all.arrays.state[2], format.state}};
  MixedArrays rest = all;
  rest.arrays = {buffers[0], buffers[1], {buffers[3], buffers[4], buffers[5]}, N};
  rest.rest = buffers[2];
  rest.index = all.index + i;
  constexpr int kArrays = 3 + Algorithm::kStates;
  for (int k = 0; k < kArrays; ++k) {
    const auto& [from, dtype] = arrays[k];
    if (from) memcpy(buffers[k], element(from, dtype, i), count * dtype_size(dtype));
  }
  Chances<false> chances(all.key, rest.index);
  update_vector<Algorithm>(h, rest, format, chances, 0);
  for (int k = 0; k < kArrays; ++k) {
    const auto& [to, dtype] = arrays[k];
    if (to && k != 1) memcpy(element(to, dtype, i), buffers[k], count * dtype_size(dtype));
  }
}

template <Dtype kDtype, ParamRounding kParam, Dtype kGrad, Dtype kState = Dtype::float32>
struct KnownFormat {
  static constexpr Dtype dtype = kDtype, grad = kGrad, state = kState;
  static constexpr ParamRounding param = kParam;
  static constexpr bool draws_for_states = true;  // float32: as codes

  static bool is(const AnyFormat& format) {
    return format.dtype == dtype && format.grad == grad && format.state == state &&
           format.param == param && format.draws_for_states;
  }
};

template <typename Algorithm, bool kShare, typename F>
void update_vectors(const Values& values, const MixedArrays& all, const F& format) {
  with_values<Algorithm, float>(values, [&](const auto& h) __attribute__((always_inline)) {
    Chances<kShare> chances(all.key, all.index);
#pragma GCC unroll 1
    for (int64_t i = 0; i + N <= all.arrays.size; i += N) {
      update_vector<Algorithm>(h, all, format, chances, i);
    }
  });
}

template <typename Algorithm>
void update_all(const Values& values, const MixedArrays& all, const AnyFormat& format) {
  constexpr auto kFloat = Dtype::float32, kShort = Dtype::bfloat16;
  using ShortStates = KnownFormat<kFloat, ParamRounding::nearest, kFloat, kShort>;
  using ShortGradients = KnownFormat<kFloat, ParamRounding::nearest, kShort, kShort>;
  using WithRemainder = KnownFormat<kShort, ParamRounding::remainder, kShort, kShort>;
  using AllShort = KnownFormat<kShort, ParamRounding::stochastic, kShort, kShort>;
  if (all.index % N != 0) {
    update_vectors<Algorithm, false>(values, all, format);
  } else if (ShortStates::is(format)) {
    update_vectors<Algorithm, true>(values, all, ShortStates());
  } else if (ShortGradients::is(format)) {
    update_vectors<Algorithm, true>(values, all, ShortGradients());
  } else if (WithRemainder::is(format)) {
    update_vectors<Algorithm, true>(values, all, WithRemainder());
  } else if (AllShort::is(format)) {
    update_vectors<Algorithm, true>(values, all, AllShort());
  } else {
    update_vectors<Algorithm, true>(values, all, format);
  }
  const int64_t done = all.arrays.size / N * N;
  if (done < all.arrays.size)
    update_rest<Algorithm>(values.float32.of<Algorithm>(), all, format, done);
}

// Elements of `all` from `begin` on, a multiple of a block.
RECAP_INLINE MixedArrays from_block(const MixedArrays& all, const AnyFormat& format,
                                    int64_t begin) {
  const auto advance = [begin](void* array, int64_t width) {
    return array ? static_cast<char*>(array) + begin * width : nullptr;
  };
  MixedArrays block = all;
  block.arrays.param = advance(all.arrays.param, dtype_size(format.dtype));
  block.arrays.grad = advance(const_cast<void*>(all.arrays.grad), dtype_size(format.grad));
  block.rest = advance(all.rest, dtype_size(rest_dtype(format)));
  for (int k = 0; k < kMaxStates; ++k) {
    block.arrays.state[k] = advance(all.arrays.state[k], 1);
    if (all.scale[k]) block.scale[k] = all.scale[k] + begin / kElementsOfScale;
  }
  block.index += begin;
  return block;
}

template <typename Algorithm>
using StatesOf = BlockOfStates<Algorithm::kStates, Algorithm::kNeverNegative>;

template <typename Algorithm, typename H, typename F, typename C>
RECAP_INLINE void update_block(const H& h, const MixedArrays& block, const F& format, C chances,
                               StatesOf<Algorithm>& states) {
#pragma GCC unroll 1
  for (int i = 0; i < kElementsOfScale; i += N) {
    Floats param = load_param(block, format, i), state[kMaxStates];
    states.load(block, i, state);
    Algorithm::update(h, load_as(format.grad, block.arrays.grad, i), param, state);
    states.keep(i, state);
    Words chance{};
    if (format.param == ParamRounding::stochastic) chance = chances.drawn(1).of[0];
    chances.go_on();
    store_param(block, format, param, chance, i);
  }
}

// Of less elements than a block has, filled up with zeros elsewhere.
template <typename Algorithm, typename H>
void update_part_of_block(const H& h, const MixedArrays& part, const AnyFormat& format,
                          int64_t count) {
  alignas(64) char buffers[3 + kMaxStates][kElementsOfScale * sizeof(float)] = {};
  struct {
    void* from;
    int64_t width;
  } const arrays[] = {{part.arrays.param, dtype_size(format.dtype)},
                      {const_cast<void*>(part.arrays.grad), dtype_size(format.grad)},
                      {part.rest, dtype_size(rest_dtype(format))},
                      {part.arrays.state[0], 1},
                      {part.arrays.state[1], 1},
                      {part.arrays.state[2], 1}};
  MixedArrays block = part;
  block.arrays = {buffers[0], buffers[1], {buffers[3], buffers[4], buffers[5]}, kElementsOfScale};
  block.rest = buffers[2];
  constexpr int kArrays = 3 + Algorithm::kStates;
  for (int k = 0; k < kArrays; ++k) {
    if (arrays[k].from) memcpy(buffers[k], arrays[k].from, count * arrays[k].width);
  }
  const Chances<false> chances(part.key, part.index);
  StatesOf<Algorithm> states;
  update_block<Algorithm>(h, block, format, chances, states);
  states.end_at(count);
  states.store(block, chances);
  for (int k = 0; k < kArrays; ++k) {
    if (arrays[k].from && k != 1) memcpy(arrays[k].from, buffers[k], count * arrays[k].width);
  }
}

template <typename Algorithm, bool kShare, typename F>
void update_blocks(const Values& values, const MixedArrays& all, const AnyFormat& any,
                   const F& format) {
  with_values<Algorithm, float>(values, [&](const auto& h) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (int64_t begin = 0; begin + kElementsOfScale <= all.arrays.size;
         begin += kElementsOfScale) {
      const MixedArrays block = from_block(all, any, begin);
      const Chances<kShare> chances(block.key, block.index);
      StatesOf<Algorithm> states;
      update_block<Algorithm>(h, block, format, chances, states);
      states.store(block, chances);
    }
  });
}

// States of 8 bits are floats in the first-level cache, a block at a time.
template <typename Algorithm>
void update_with_codes(const Values& values, const MixedArrays& all, const AnyFormat& format) {
  constexpr auto kFloat = Dtype::float32, kShort = Dtype::bfloat16;
  using Plain = KnownFormat<kFloat, ParamRounding::nearest, kFloat>;
  using WithRemainder = KnownFormat<kShort, ParamRounding::remainder, kShort>;
  if (all.index % N != 0) {
    update_blocks<Algorithm, false>(values, all, format, format);
  } else if (Plain::is(format)) {
    update_blocks<Algorithm, true>(values, all, format, Plain());
  } else if (WithRemainder::is(format)) {
    update_blocks<Algorithm, true>(values, all, format, WithRemainder());
  } else {
    update_blocks<Algorithm, true>(values, all, format, format);
  }
  const int64_t done = all.arrays.size / kElementsOfScale * kElementsOfScale;
  if (done < all.arrays.size) {
    update_part_of_block<Algorithm>(values.float32.of<Algorithm>(), from_block(all, format, done),
                                    format, all.arrays.size - done);
  }
}

template <typename Algorithm>
void mixed_kernel(const Values& values, const MixedArrays& arrays) {
  const MixedArrays all = arrays;  // copies, which no store can change
  const AnyFormat format{*all.format, all.dtype};
  if constexpr (Algorithm::kStates > 0) {
    if (format.has_codes) return update_with_codes<Algorithm>(values, all, format);
  }
  update_all<Algorithm>(values, all, format);
}

}  // namespace

#define RECAP_KERNEL(name, ...) mixed_kernel<typename UpdateType<Update::name>::type>,
extern const MixedKernel RECAP_TABLE(mixed_kernels)[kUpdates];
const MixedKernel RECAP_TABLE(mixed_kernels)[kUpdates] = {RECAP_ELEMENT_UPDATES(RECAP_KERNEL)};
#undef RECAP_KERNEL

}  // namespace recap::cpu
