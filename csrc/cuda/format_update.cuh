// How a thread block updates a tile of a slot with a format: its arrays are of several dtypes, and
// rounded as the format says. The elements are floats between load and store, where update_tile has
// them too.
//
//  * There is one body for all updates and formats, but for the arithmetic of the update itself:
//  what
//    a format says is asked while the kernel runs, by all threads of a block alike.
//  * A thread has 4 elements that follow each other, of every array, whatever its dtype: 16, 8 or 4
//    bytes, accessed at once if they are aligned, else one by one.
//  * All loads are asked for before the first is converted.
//  * The elements of a warp are those that share the scale of 8-bit states.
#pragma once

#include "../numerics/codes.h"
#include "tile_update.cuh"

namespace recap::cuda {

constexpr int kOwn = 4;  // elements of a thread
constexpr int kFormatChunk = kThreads * kOwn;
constexpr int kWarp = 32;
static_assert(kWarp * kOwn == kElementsOfScale && kFormatChunk % kElementsOfScale == 0);

// Elements of a tile that a thread has: those from `begin` on, `count` of them, perhaps none.
struct Own {
  int begin, count;

  RECAP_DEVICE bool is_at_once(const void* array, int width) const {
    return count == kOwn && reinterpret_cast<uintptr_t>(array) % (kOwn * width) == 0;
  }
};

// Four numbers, each in a word of its own: a float, or what is stored of it in the lower bits.
using Words = Share<float>;

template <typename Stored>
RECAP_DEVICE void load_one_by_one(const Stored* array, int count, Words& words) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    words.word[i] = i < count ? static_cast<uint32_t>(__ldca(array + i)) : 0u;
  }
}

// Elements that were loaded at once are spread out by `spread`, later.
struct Raw {
  Words words;
  int packed;  // bytes of an element, if several are in a word; else 0
};

RECAP_DEVICE Raw load_own(const void* array, int width, Own own) {
  const auto* const from = static_cast<const char*>(array) + own.begin * width;
  const bool at_once = own.is_at_once(from, width);
  Raw raw = {{}, at_once && width < 4 ? width : 0};
  if (width == 4) {
    if (at_once) {
      raw.words = load_from<Words>(from);
    } else {
      load_one_by_one(reinterpret_cast<const unsigned int*>(from), own.count, raw.words);
    }
  } else if (width == 2) {
    if (at_once) {
      const auto pair = load_from<uint2>(from);
      raw.words.word[0] = pair.x;
      raw.words.word[1] = pair.y;
    } else {
      load_one_by_one(reinterpret_cast<const unsigned short*>(from), own.count, raw.words);
    }
  } else if (at_once) {
    raw.words.word[0] = load_from<uint32_t>(from);
  } else {
    load_one_by_one(reinterpret_cast<const unsigned char*>(from), own.count, raw.words);
  }
  return raw;
}

RECAP_DEVICE Words spread(const Raw& raw) {
  Words words = raw.words;
  if (raw.packed == 1) {
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) words.word[i] = words.word[0] >> 8 * i & 0xffu;
  } else if (raw.packed == 2) {
    words.word[3] = words.word[1] >> 16;
    words.word[2] = words.word[1] & 0xffffu;
    words.word[1] = words.word[0] >> 16;
    words.word[0] &= 0xffffu;
  }
  return words;
}

RECAP_DEVICE void store_own(void* array, int width, Own own, const Words& words) {
  auto* const to = static_cast<char*>(array) + own.begin * width;
  const uint32_t* const word = words.word;
  if (own.is_at_once(to, width)) {
    switch (width) {
      case 4: store_to(to, words); return;
      case 2: store_to(to, uint2{word[0] | word[1] << 16, word[2] | word[3] << 16}); return;
      default: store_to(to, word[0] | word[1] << 8 | word[2] << 16 | word[3] << 24); return;
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i >= own.count) continue;
    switch (width) {
      case 4: store_to(to + 4 * i, word[i]); break;
      case 2: store_to(to + 2 * i, static_cast<uint16_t>(word[i])); break;
      default: store_to(to + i, static_cast<uint8_t>(word[i]));
    }
  }
}

RECAP_DEVICE int width_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

RECAP_DEVICE uint32_t float_of(Dtype dtype, uint32_t stored) {
  switch (dtype) {
    case Dtype::bfloat16: return float_bits(load(BFloat16{static_cast<uint16_t>(stored)}));
    case Dtype::float16: return float_bits(load(Float16{static_cast<uint16_t>(stored)}));
    default: return stored;
  }
}

template <typename... Chance>
RECAP_DEVICE uint32_t rounded(Dtype dtype, uint32_t bits, Chance... chance) {
  const float value = float_from_bits(bits);
  BFloat16 brain;
  Float16 half;
  switch (dtype) {
    case Dtype::bfloat16: store(value, chance..., brain); return brain.bits;
    case Dtype::float16: store(value, chance..., half); return half.bits;
    default: return bits;
  }
}

RECAP_DEVICE void to_floats(Dtype dtype, Words& words) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) words.word[i] = float_of(dtype, words.word[i]);
}
RECAP_DEVICE void to_nearest(Dtype dtype, Words& words) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) words.word[i] = rounded(dtype, words.word[i]);
}

// How the numbers of an array are rounded by chance.
struct Rounding {
  bool is_asked_for;
  Dtype dtype;
  bool is_code, is_signed;  // a code, not of `dtype`
  float inverse;            // of its scale

  RECAP_DEVICE uint32_t round(uint32_t bits, uint32_t word, uint32_t power) const {
    return is_code ? code_of(float_from_bits(bits), is_signed, inverse, random_bits(word, power))
                   : rounded(dtype, bits, chance(word, power));
  }
};

// Rounds those of two by the words of one draw.
RECAP_DEVICE void by_chance(uint64_t key, uint64_t index, int number, const Rounding& first,
                            Words& first_words, const Rounding& second, Words& second_words) {
  Draw shared = {};
  uint32_t power = 0;
#pragma unroll 1
  for (int i = 0; i < kOwn; ++i, ++index) {
    if (i == 0 || index % kElementsOfDraw == 0) {
      shared = draw(key, index, number);
      power = power_of_multiplier(index);
    }
    uint32_t &one = first_words.word[0], &other = second_words.word[0];
    if (first.is_asked_for) one = first.round(one, shared.words[0], power);
    if (second.is_asked_for) other = second.round(other, shared.words[1], power);
    rotate(first_words);
    rotate(second_words);
    power *= kMultiplier;
  }
}

// The largest magnitude that a warp has, as bits.
RECAP_DEVICE uint32_t largest_of_warp(const Words& words, int count) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t bits = i < count ? words.word[i] & 0x7fffffffu : 0u;
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// A parameter that is stored in two arrays.
RECAP_DEVICE void join(ParamRounding kind, Words& param, const Words& rest) {
  if (kind != ParamRounding::remainder && kind != ParamRounding::master) return;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const auto stored = static_cast<uint16_t>(param.word[i]);
    const uint32_t more = rest.word[i];
    const float value = kind == ParamRounding::remainder
                            ? load(BFloat16{stored}, static_cast<int16_t>(more))
                            : load(Float16{stored}, float_from_bits(more));
    param.word[i] = float_bits(value);
  }
}
RECAP_DEVICE void part(ParamRounding kind, Words& param, Words& rest) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float value = float_from_bits(param.word[i]);
    if (kind == ParamRounding::remainder) {
      BFloat16 upper;
      int16_t lower;
      store(value, upper, lower);
      param.word[i] = upper.bits;
      rest.word[i] = static_cast<uint16_t>(lower);
    } else {
      rest.word[i] = param.word[i];
      param.word[i] = rounded(Dtype::float16, param.word[i]);
    }
  }
}

// The same object, as if it were not known yet: what is read of it is read anew. Kept from the
// loads to the stores, addresses and values would take the registers that elements need.
template <typename T>
RECAP_DEVICE const T& anew(const T& object) {
  uint32_t zero = 0;
  asm volatile("" : "+r"(zero));
  return (&object)[zero];
}

// Whether state k of an update may be negative.
RECAP_DEVICE bool is_signed(Update update, int k) {
#define RECAP_BIT_OF(name, ...)                                   \
  | uint64_t{UpdateType<Update::name>::type::kNeverNegative & 7u} \
          << 3 * static_cast<int>(Update::name)
  constexpr uint64_t kBits = 0 RECAP_ELEMENT_UPDATES(RECAP_BIT_OF);
#undef RECAP_BIT_OF
  static_assert(3 * kUpdates <= 64);
  return !(kBits >> (3 * static_cast<int>(update) + k) & 1);
}

RECAP_DEVICE void from_codes(bool is_signed, float scale, Words& words) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float value = load_code(static_cast<uint8_t>(words.word[i]), is_signed, scale);
    words.word[i] = float_bits(value);
  }
}

// The arrays of a tile with a format.
struct FormatArrays {
  const TileEntry& tile;
  const FormatEntry& format;

  RECAP_DEVICE FormatArrays(const TileEntry& of_tile, const FormatEntry* formats)
      : tile(anew(of_tile)), format(formats[tile.format()]) {}

  RECAP_DEVICE void* from_first(const void* array, int width) const {
    return const_cast<char*>(static_cast<const char*>(array)) + tile.begin * width;
  }
  RECAP_DEVICE bool has_rest() const {
    return format.param == ParamRounding::remainder || format.param == ParamRounding::master;
  }
  RECAP_DEVICE int state_width() const {
    return format.has_codes ? 1 : width_of(format.state_dtype);
  }
  RECAP_DEVICE float* scale(int k, int begin) const {
    return format.scale[k] + (tile.begin + begin) / kElementsOfScale;
  }
  RECAP_DEVICE int rest_width() const { return format.param == ParamRounding::remainder ? 2 : 4; }
};

// The elements that a thread updates, as floats; states that there are not are 0.
struct Elements {
  Words param, grad, state[kMaxStates];
};

RECAP_DEVICE void load_all(const FormatArrays& arrays, Update update, const void* grad, Own own,
                           Elements& elements) {
  const auto& [tile, format] = arrays;
  const Dtype dtype = tile.dtype, of_grad = format.grad, of_state = format.state_dtype;
  const bool has_rest = arrays.has_rest();
  const Raw param = load_own(tile.param, width_of(dtype), own);
  const Raw gradient = load_own(arrays.from_first(grad, width_of(of_grad)), width_of(of_grad), own);
  Raw rest = {}, state[kMaxStates] = {};
  float scale[kMaxStates] = {};
  if (has_rest) {
    const int width = arrays.rest_width();
    rest = load_own(arrays.from_first(format.rest, width), width, own);
  }
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    if (!format.state[k]) continue;
    const int width = arrays.state_width();
    state[k] = load_own(arrays.from_first(format.state[k], width), width, own);
    if (format.has_codes && own.count > 0) scale[k] = load_from<float>(arrays.scale(k, own.begin));
  }
  elements.param = spread(param);
  if (has_rest) {
    join(format.param, elements.param, spread(rest));
  } else {
    to_floats(dtype, elements.param);
  }
  elements.grad = spread(gradient);
  to_floats(of_grad, elements.grad);
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    elements.state[k] = spread(state[k]);
    if (format.has_codes) {
      from_codes(is_signed(update, k), scale[k], elements.state[k]);
    } else {
      to_floats(of_state, elements.state[k]);
    }
  }
}

template <typename Algorithm>
RECAP_DEVICE void update_elements(const UpdateValues<float>& values, Elements& elements) {
  const auto& h = values.of<Algorithm>();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float param = elements.param.get(i), state[kMaxStates] = {};
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) state[k] = elements.state[k].get(i);
    Algorithm::update(h, elements.grad.get(i), param, state);
    elements.param.set(i, param);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) elements.state[k].set(i, state[k]);
  }
}

RECAP_DEVICE void update_elements(Update update, const UpdateValues<float>& values,
                                  Elements& elements) {
#define RECAP_CASE(name, ...) \
  case Update::name:          \
    return update_elements<typename UpdateType<Update::name>::type>(values, elements);
#define RECAP_NOT_HERE(name, ...) \
  case Update::name: return;  // refused for parameters on these devices
  switch (update) { RECAP_ELEMENT_UPDATES(RECAP_CASE) RECAP_ROW_UPDATES(RECAP_NOT_HERE) }
#undef RECAP_NOT_HERE
#undef RECAP_CASE
}

// Stores the scale of a state, if it has one, and says how it is rounded.
RECAP_DEVICE Rounding rounding_of(const FormatArrays& arrays, Update update, Own own, int k,
                                  const Words& words) {
  const auto& format = arrays.format;
  Rounding rounding = {format.state[k] != nullptr, format.state_dtype, format.has_codes,
                       is_signed(update, k), 0.0f};
  if (format.has_codes && rounding.is_asked_for) {
    const float scale = scale_of(largest_of_warp(words, own.count), rounding.is_signed);
    rounding.inverse = divide(1.0f, scale);
    if (threadIdx.x % kWarp == 0) store_to(arrays.scale(k, own.begin), scale);
  }
  return rounding;
}

// Rounds what is drawn for, and leaves floats of the rest.
RECAP_DEVICE void round_by_chance(const FormatArrays& arrays, Update update, const uint64_t* step,
                                  Own own, Elements& elements) {
  const auto& [tile, format] = arrays;
  if (!format.draws()) return;
  const uint64_t key = rounding_key(format.seed, *step);
  const uint64_t index = format.first_element + tile.begin + own.begin;
  Words* const state = elements.state;
  Rounding third = {};
  if (format.draws_for_states) {
    const Rounding first = rounding_of(arrays, update, own, 0, state[0]);
    const Rounding second = rounding_of(arrays, update, own, 1, state[1]);
    by_chance(key, index, 0, first, state[0], second, state[1]);
    third = rounding_of(arrays, update, own, 2, state[2]);
  }
  const Rounding param = {format.param == ParamRounding::stochastic, tile.dtype, false, false,
                          0.0f};
  if (param.is_asked_for || third.is_asked_for) {
    by_chance(key, index, 1, param, elements.param, third, state[2]);
  }
}

RECAP_DEVICE void store_all(const FormatArrays& arrays, Own own, Elements& elements) {
  const auto& [tile, format] = arrays;
  if (arrays.has_rest()) {
    Words rest;
    const int width = arrays.rest_width();
    part(format.param, elements.param, rest);
    store_own(arrays.from_first(format.rest, width), width, own, rest);
  } else if (format.param == ParamRounding::nearest) {
    to_nearest(tile.dtype, elements.param);
  }
  store_own(tile.param, width_of(tile.dtype), own, elements.param);
  const Dtype of_state = format.state_dtype;
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    if (!format.state[k]) continue;
    if (!format.draws_for_states) to_nearest(of_state, elements.state[k]);
    const int width = arrays.state_width();
    store_own(arrays.from_first(format.state[k], width), width, own, elements.state[k]);
  }
}

// `step` is that of the slot, and read only if the format draws.
RECAP_DEVICE void update_tile_in_format(Update update, const UpdateValues<float>& values,
                                        const TileEntry& tile, const FormatEntry* formats,
                                        const void* grad, const uint64_t* step) {
  const int size = tile.size;
  const int lane = threadIdx.x % kWarp;
  // All threads of a warp, as long as one has elements: they find a scale together.
#pragma unroll 1
  for (int begin = threadIdx.x * kOwn; begin - lane * kOwn < size; begin += kFormatChunk) {
    const int left = size - begin;
    const Own own = {begin, left < 0 ? 0 : left < kOwn ? left : kOwn};
    Elements elements;
    load_all(FormatArrays(tile, formats), update, grad, own, elements);
    update_elements(update, anew(values), elements);
    round_by_chance(FormatArrays(tile, formats), update, step, own, elements);
    store_all(FormatArrays(tile, formats), own, elements);
  }
}

// As `clear_grad` does.
RECAP_DEVICE void clear_grad_in_format(const TileEntry& tile, const FormatEntry* formats,
                                       const void* grad) {
  const int width = width_of(formats[tile.format()].grad);
  void* const from = static_cast<char*>(const_cast<void*>(grad)) + tile.begin * width;
  const int size = tile.size;
#pragma unroll 1
  for (int begin = threadIdx.x * kOwn; begin < size; begin += kFormatChunk) {
    store_own(from, width, {begin, size - begin < kOwn ? size - begin : kOwn}, Words{});
  }
}

}  // namespace recap::cuda
