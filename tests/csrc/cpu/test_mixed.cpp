// Slots with a format: the same bits as one element after the other, in every format, update and
// instruction set, wherever a vector or a tile begins.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/engine.h"
#include "cpu/ways.h"
#include "guarded.h"
#include "numerics/codes.h"
#include "numerics/rounding.h"
#include "problem.h"

namespace {

using recap::BFloat16;
using recap::Float16;
using recap::Format;
using recap::ParamRounding;

constexpr Dtype kFormats[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
// Param, gradient, rest, states, their scales.
constexpr int kScales = 3 + recap::kMaxStates, kAll = kScales + recap::kMaxStates;

struct Case {
  Update update;
  Dtype dtype;
  Format format;
  int64_t size;
};

float load_one(Dtype dtype, const void* from, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: return recap::load(static_cast<const BFloat16*>(from)[i]);
    case Dtype::float16: return recap::load(static_cast<const Float16*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

void store_one(Dtype dtype, float value, void* to, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: recap::store(value, static_cast<BFloat16*>(to)[i]); return;
    case Dtype::float16: recap::store(value, static_cast<Float16*>(to)[i]); return;
    default: static_cast<float*>(to)[i] = value;
  }
}

void store_one(Dtype dtype, float value, uint32_t chance, void* to, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16: recap::store(value, chance, static_cast<BFloat16*>(to)[i]); return;
    case Dtype::float16: recap::store(value, chance, static_cast<Float16*>(to)[i]); return;
    default: static_cast<float*>(to)[i] = value;
  }
}

class Memory {
 public:
  Memory(const Case& each, uint32_t seed) {
    const int states = states_of(each.update);
    const Dtype dtypes[kAll] = {each.dtype,        each.format.grad,  rest_dtype(each.format),
                                each.format.state, each.format.state, each.format.state};
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> numbers(-2, 2);
    for (int k = 0; k < 3 + states; ++k) {
      const bool is_coded = k >= 3 && each.format.has_codes;
      const size_t width = is_coded ? 1 : recap::dtype_size(dtypes[k]);
      arrays_[k] = std::make_unique<Guarded>(each.size * width, k * width);
      if (is_coded) {
        fill_codes(k, each.size, random);
        continue;
      }
      for (int64_t i = 0; i < each.size; ++i) {
        float value = numbers(random);
        if (i % 7 == 3) value *= 1e-6f;
        if (k - 3 >= first_squares(each.update) && k >= 3) value = std::fabs(value);
        if (k != 2) store_one(dtypes[k], value, arrays_[k]->data(), i);
      }
    }
    if (each.format.param == ParamRounding::remainder) {
      for (int64_t i = 0; i < each.size; ++i) {
        reinterpret_cast<int16_t*>(arrays_[2]->data())[i] = static_cast<int16_t>(random());
        if (i % 5 == 0) reinterpret_cast<BFloat16*>(arrays_[0]->data())[i] = {0x8000};
      }
    }
    if (each.format.param == ParamRounding::master) {
      for (int64_t i = 0; i < each.size; ++i) {
        const float master = load_one(each.dtype, arrays_[0]->data(), i);
        reinterpret_cast<float*>(arrays_[2]->data())[i] = master * (i % 3 ? 1.00001f : 2.0f);
      }
    }
    slot.param = arrays_[0]->data();
    format = each.format;
    for (int k = 0; k < states; ++k) {
      slot.state[k] = arrays_[3 + k]->data();
      if (format.has_codes) format.scale[k] = arrays_[kScales + k]->data();
    }
    slot.size = each.size;
    slot.dtype = each.dtype;
    format.rest = arrays_[2]->data();
    slot.format = &format;
  }
  Memory(const Memory&) = delete;

  const void* grad() const { return arrays_[1]->data(); }
  void* data(int k) const { return arrays_[k]->data(); }

  bool same(const Memory& other) const {
    for (int k = 0; k < kAll; ++k) {
      if (!arrays_[k]) continue;
      if (!arrays_[k]->intact() || !other.arrays_[k]->intact()) return false;
      if (std::memcmp(data(k), other.data(k), arrays_[k]->size()) != 0) return false;
    }
    return true;
  }

  recap::Slot slot;
  Format format;

 private:
  void fill_codes(int k, int64_t size, std::mt19937& random) {
    const int64_t blocks = (size + recap::kElementsOfScale - 1) / recap::kElementsOfScale;
    auto& scales = arrays_[kScales + k - 3];
    scales = std::make_unique<Guarded>(blocks * sizeof(float), 4 * k);
    for (int64_t i = 0; i < size; ++i) arrays_[k]->data()[i] = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < blocks; ++i) {
      const float scale = i % 5 == 4 ? 0.0f : std::ldexp(1.0f, -static_cast<int>(i % 40));
      std::memcpy(scales->data() + i * sizeof scale, &scale, sizeof scale);
    }
  }

  std::array<std::unique_ptr<Guarded>, kAll> arrays_;
};

float& scale(const Format& format, int k, int64_t i) {
  return static_cast<float*>(format.scale[k])[i / recap::kElementsOfScale];
}

template <typename Algorithm>
bool is_signed(int k) {
  return !(Algorithm::kNeverNegative >> k & 1);
}

template <typename Algorithm>
void store_codes(const Memory& memory, int k, const std::vector<float>& values, uint64_t key) {
  const Format& format = memory.format;
  const auto size = static_cast<int64_t>(values.size());
  for (int64_t begin = 0; begin < size; begin += recap::kElementsOfScale) {
    float largest = 0;
    const int64_t end = std::min<int64_t>(begin + recap::kElementsOfScale, size);
    for (int64_t i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(values[i]));
    scale(format, k, begin) = recap::scale_of(recap::float_bits(largest), is_signed<Algorithm>(k));
  }
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t index = format.first_element + i;
    const uint32_t word = recap::draw(key, index, k / 2).words[k == 1 || k == 2];
    static_cast<uint8_t*>(memory.slot.state[k])[i] =
        recap::code_of(values[i], is_signed<Algorithm>(k), 1.0f / scale(format, k, i),
                       recap::random_bits(word, recap::power_of_multiplier(index)));
  }
}

template <typename Algorithm>
void update_one_by_one(const recap::Values& values, const Memory& memory) {
  const Format& format = memory.format;
  const recap::Slot& slot = memory.slot;
  const auto& h = values.float32.of<Algorithm>();
  const uint64_t key = recap::rounding_key(format.seed, values.step);
  auto* const short_param = static_cast<BFloat16*>(slot.param);
  auto* const remainder = static_cast<int16_t*>(format.rest);
  auto* const master = static_cast<float*>(format.rest);
  std::vector<float> codes[recap::kMaxStates];  // the values to become such
  for (int64_t i = 0; i < slot.size; ++i) {
    float param = load_one(slot.dtype, slot.param, i);
    if (format.param == ParamRounding::remainder) param = recap::load(short_param[i], remainder[i]);
    if (format.param == ParamRounding::master) {
      param = recap::load(static_cast<const Float16*>(slot.param)[i], master[i]);
    }
    float state[recap::kMaxStates] = {};
    for (int k = 0; k < Algorithm::kStates; ++k) {
      state[k] = format.has_codes ? recap::load_code(static_cast<uint8_t*>(slot.state[k])[i],
                                                     is_signed<Algorithm>(k), scale(format, k, i))
                                  : load_one(format.state, slot.state[k], i);
    }
    Algorithm::update(h, load_one(format.grad, memory.grad(), i), param, state);
    const uint64_t index = format.first_element + i;
    const uint32_t power = recap::power_of_multiplier(index);
    const auto chance = [&](int draw, int word) {
      return recap::chance(recap::draw(key, index, draw).words[word], power);
    };
    const uint32_t of_state[] = {chance(0, 0), chance(0, 1), chance(1, 1)};
    for (int k = 0; k < Algorithm::kStates; ++k) {
      if (format.has_codes) {
        codes[k].push_back(state[k]);
      } else if (format.draws_for_states) {
        store_one(format.state, state[k], of_state[k], slot.state[k], i);
      } else {
        store_one(format.state, state[k], slot.state[k], i);
      }
    }
    switch (format.param) {
      case ParamRounding::remainder: recap::store(param, short_param[i], remainder[i]); break;
      case ParamRounding::master: master[i] = param; [[fallthrough]];
      case ParamRounding::nearest: store_one(slot.dtype, param, slot.param, i); break;
      case ParamRounding::stochastic:
        store_one(slot.dtype, param, chance(1, 0), slot.param, i);
        break;
    }
  }
  if (!format.has_codes) return;
  for (int k = 0; k < Algorithm::kStates; ++k) store_codes<Algorithm>(memory, k, codes[k], key);
}

void update_one_by_one(const recap::Values& values, const Memory& memory) {
#define RECAP_CASE(name, ...) \
  case Update::name:          \
    return update_one_by_one<recap::UpdateType<Update::name>::type>(values, memory);
  switch (values.update) {
    RECAP_ELEMENT_UPDATES(RECAP_CASE)
    default: break;
  }
#undef RECAP_CASE
}

void run(const recap::Values& values, const Memory& memory, const recap::cpu::ThreadPool& pool) {
  recap::Plan plan;
  plan.slots = {memory.slot};
  plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
  recap::Step step;
  step.grads = {memory.grad()};
  step.values_of_slot = {0};
  step.values = {values};
  recap::cpu::run(plan, step, pool);
}

constexpr recap::cpu::ThreadPool kOneThread{1, nullptr};

// One thread after the other.
constexpr recap::cpu::ThreadPool kThreeThreads{
    3, [](int count, void (*task)(int, void*), void* context) {
      for (int i = 0; i < count; ++i) task(i, context);
    }};

template <typename Visit>
void for_formats(Visit&& visit) {
  for (const Dtype dtype : kFormats) {
    for (const Dtype grad : kFormats) {
      for (const Dtype state : kFormats) {
        for (int param = 0; param < 4; ++param) {
          const auto rounding = static_cast<ParamRounding>(param);
          if (rounding == ParamRounding::remainder && dtype != Dtype::bfloat16) continue;
          if (rounding == ParamRounding::master && dtype != Dtype::float16) continue;
          for (const int draws : {0, 1, 2}) {
            Format format;
            if (draws == 2 && state != Dtype::float32) continue;
            format.has_codes = draws == 2;
            format.grad = grad;
            format.state = state;
            format.param = rounding;
            format.draws_for_states = draws && (state != Dtype::float32 || format.has_codes);
            format.seed = 77;
            visit(dtype, format);
          }
        }
      }
    }
  }
}

void check(const Case& each, const recap::cpu::ThreadPool& pool = kOneThread) {
  const recap::Values values =
      recap::make_values(hyper_for(each.update, each.size % 2), 5, false, 2);
  const Memory expected(each, 3);
  update_one_by_one(values, expected);
  for (const std::string& set : recap::cpu::instruction_sets()) {
    CHECK(recap::cpu::use_instruction_set(set));
    const Memory found(each, 3);
    run(values, found, pool);
    CHECK(found.same(expected), "update ", static_cast<int>(each.update), ", dtype ",
          static_cast<int>(each.dtype), ", gradient ", static_cast<int>(each.format.grad),
          ", state ", static_cast<int>(each.format.state), ", rounding ",
          static_cast<int>(each.format.param), ", draws ", each.format.draws_for_states, ", codes ",
          each.format.has_codes, ", set ", set, ", size ", each.size, ", from ",
          each.format.first_element);
  }
  recap::cpu::use_instruction_set("");
}

TEST(every_format_and_update_has_the_bits_of_one_element_after_the_other) {
  for (int update = 0; update < recap::kUpdates; ++update) {
    for_formats([update](Dtype dtype, const Format& format) {
      const int blocks = format.has_codes ? 2 * recap::kElementsOfScale : 0;
      check({static_cast<Update>(update), dtype, format, blocks + 45 + update % 2});
    });
  }
}

TEST(chances_follow_from_the_place_in_the_whole_parameter) {
  for (const int64_t first :
       {int64_t{1}, int64_t{4}, int64_t{8}, int64_t{16}, int64_t{0xfffffff0}}) {
    for_formats([first](Dtype dtype, Format format) {
      if (!format.draws()) return;
      format.first_element = first;
      check({Update::adam_amsgrad, dtype, format, 67});
    });
  }
}

TEST(long_slots_have_the_same_bits_in_every_way_and_split) {
  using recap::cpu::Way;
  for (const Way way : {Way{1, 0}, Way{2, 8}, Way{3, 1}, Way{8, 32}}) {
    recap::cpu::fix_way(way.streams, way.ahead);
    for (const auto rounding : {ParamRounding::stochastic, ParamRounding::remainder}) {
      Format format;
      format.grad = Dtype::bfloat16;
      format.state = Dtype::bfloat16;
      format.param = rounding;
      format.draws_for_states = true;
      check({Update::adam, Dtype::bfloat16, format, 20 * recap::cpu::kTileSize + 13},
            kThreeThreads);
      format.state = Dtype::float32;
      format.has_codes = true;
      check({Update::adam, Dtype::bfloat16, format, 20 * recap::cpu::kTileSize + 13},
            kThreeThreads);
    }
  }
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

// How often a number is rounded up is the part of the way to the next that it has gone.
template <typename T>
void check_mean(float value, float below, float above) {
  constexpr int kTimes = 200'000;
  double sum = 0;
  const uint64_t key = recap::rounding_key(1, 1);
  for (int i = 0; i < kTimes; ++i) {
    const uint32_t power = recap::power_of_multiplier(i);
    for (int number = 0; number < 2; ++number) {
      for (const uint32_t word : recap::draw(key, i, number).words) {
        T rounded;
        recap::store(value, recap::chance(word, power), rounded);
        const float stored = recap::load(rounded);
        CHECK(stored == below || stored == above, "rounded to ", stored);
        sum += stored == above;
      }
    }
  }
  const double part = (double{value} - below) / (double{above} - below);
  const double sigma = std::sqrt(part * (1 - part) / (4 * kTimes));
  CHECK(std::fabs(sum / (4 * kTimes) - part) <= 4 * sigma + 1.0 / (1 << 16), value,
        " is rounded up ", sum / (4 * kTimes), " of the time, and should be ", part);
}

TEST(rounding_is_right_in_the_mean) {
  check_mean<BFloat16>(1.0f + 0x1p-9f, 1.0f, 1.0078125f);
  check_mean<BFloat16>(-1.0f - 0x1p-7f * 0.9f, -1.0f, -1.0078125f);
  check_mean<BFloat16>(0x1p-133f * 2.25f, 0x1p-132f, 0x1p-133f * 3);
  check_mean<Float16>(1.0f + 0x1p-12f, 1.0f, 1.0f + 0x1p-10f);
  check_mean<Float16>(-0x1.0p-24f * 7.125f, -0x1p-24f * 7, -0x1p-21f);
  check_mean<Float16>(0x1p-26f, 0.0f, 0x1p-24f);
}

TEST(what_can_be_stored_exactly_is_and_numbers_stay_numbers) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const uint32_t chance : {0u, 1u, 0x7fffu, 0xffffu}) {
    for (const float value : {0.0f, -0.0f, 1.0f, -1.5f, 0x1p-24f, 0x1p-14f, inf, -inf, nan}) {
      BFloat16 brain;
      Float16 half;
      recap::store(value, chance, brain);
      recap::store(value, chance, half);
      for (const float stored : {recap::load(brain), recap::load(half)}) {
        CHECK(value != value ? stored != stored : stored == value, value, " became ", stored);
      }
    }
    Float16 half;
    recap::store(1e6f, chance, half);
    CHECK_EQ(recap::load(half), inf);
  }
  BFloat16 quiet;
  recap::store(recap::float_from_bits(0x7fffffffu), 0xffffu, quiet);  // as CUDA has it
  CHECK(recap::load(quiet) != recap::load(quiet));
}

TEST(a_remainder_has_all_bits_that_the_parameter_lacks) {
  std::mt19937 random(9);
  for (int i = 0; i < 1'000'000; ++i) {
    const float value = recap::float_from_bits(static_cast<uint32_t>(random()));
    BFloat16 param;
    int16_t remainder;
    recap::store(value, param, remainder);
    const float found = recap::load(param, remainder);
    CHECK(value != value ? found != found : recap::float_bits(found) == recap::float_bits(value));
    BFloat16 nearest;
    recap::store(value, nearest);
    const bool is_tie = (recap::float_bits(value) & 0xffffu) == 0x8000u;
    CHECK(value != value || is_tie || param.bits == nearest.bits);
  }
  CHECK_EQ(recap::load(BFloat16{0}, int16_t{-5}), 0.0f);  // somebody has set it to zero
}

// The number that a code stands for, and the next larger one.
float number_of(int code, bool is_signed) {
  return recap::load_code(static_cast<uint8_t>(code), is_signed, 1.0f);
}

TEST(codes_stand_for_numbers_in_their_order_and_each_is_stored_as_itself) {
  for (const bool is_signed : {false, true}) {
    const int codes = is_signed ? 128 : 256;
    for (int code = 0; code < codes; ++code) {
      const float number = number_of(code, is_signed);
      CHECK(code == 0 ? number == 0 : number > number_of(code - 1, is_signed));
      for (const uint32_t random : {0u, 0x7fffffffu, 0xffffffffu}) {
        CHECK_EQ(int{recap::code_of(number, is_signed, 1.0f, random)}, code);
        if (is_signed) {
          CHECK_EQ(int{recap::code_of(-number, true, 1.0f, random)}, code + 128);
        }
      }
    }
    const float largest = number_of(codes - 1, is_signed);
    CHECK_EQ(recap::scale_of(recap::float_bits(largest), is_signed), 1.0f);
    CHECK_EQ(int{recap::code_of(1.001f * largest, is_signed, 1.0f, 0xffffffffu)}, codes - 1);
  }
  CHECK_EQ(int{recap::code_of(1e-30f, false, 1.0f, 0)}, 1);  // never zero
  CHECK_EQ(int{recap::code_of(1e-30f, true, 1.0f, 0)}, 0);
  CHECK_EQ(int{recap::code_of(0.0f, false, 1.0f, 0xffffffffu)}, 0);
}

TEST(codes_are_right_in_the_mean) {
  constexpr int kTimes = 200'000;
  for (const bool is_signed : {false, true}) {
    for (const int code : {10, 77, 120}) {
      const float below = number_of(code, is_signed), above = number_of(code + 1, is_signed);
      const float value = below + 0.3f * (above - below);
      const double part = (double{value} - below) / (double{above} - below);
      int ups = 0;
      for (int i = 0; i < kTimes; ++i) {
        const uint32_t word = recap::draw(recap::rounding_key(2, 1), i, 0).words[0];
        const uint32_t random = recap::random_bits(word, recap::power_of_multiplier(i));
        const int found = recap::code_of(value, is_signed, 1.0f, random);
        CHECK(found == code || found == code + 1);
        ups += found - code;
      }
      const double sigma = std::sqrt(part * (1 - part) / kTimes);
      CHECK(std::fabs(static_cast<double>(ups) / kTimes - part) <= 4 * sigma);
    }
  }
}

TEST(a_block_with_a_nan_becomes_nan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float value : {nan, std::numeric_limits<float>::infinity()}) {
    const float scale = recap::scale_of(recap::float_bits(value), true);
    CHECK(scale != scale);
    CHECK_EQ(int{recap::code_of(-1.0f, true, 1.0f / scale, 0)}, 0);
  }
}

}  // namespace
