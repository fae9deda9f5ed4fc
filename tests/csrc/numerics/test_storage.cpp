// The 16-bit formats, against their definition by sign, exponent and fraction, in double.
#include "numerics/storage.h"

#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "cpu/float_mode.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using recap::BFloat16;
using recap::Float16;

struct Format {
  int exponent_bits, fraction_bits;

  int least_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
  uint16_t infinity() const { return ((1 << exponent_bits) - 1) << fraction_bits; }
  bool is_nan(uint16_t bits) const { return (bits & 0x7fff) > infinity(); }
  bool is_quiet(uint16_t bits) const { return (bits >> (fraction_bits - 1)) & 1; }
};

template <typename Storage>
constexpr Format kFormat{};
template <>
constexpr Format kFormat<Float16>{5, 10};
template <>
constexpr Format kFormat<BFloat16>{8, 7};

// What a pattern stands for.
double decode(Format format, uint16_t bits) {
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = (bits & 0x7fff) >> format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const double fraction_value = std::ldexp(fraction, -format.fraction_bits);
  if (exponent == (1 << format.exponent_bits) - 1) {
    return std::copysign(fraction ? std::numeric_limits<double>::quiet_NaN()
                                  : std::numeric_limits<double>::infinity(),
                         sign);
  }
  if (exponent == 0) return sign * std::ldexp(fraction_value, format.least_exponent());
  return sign * std::ldexp(1.0 + fraction_value, exponent - 1 + format.least_exponent());
}

// The pattern nearest to a number that is not NaN, the even one of two as near.
uint16_t encode(Format format, double value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | format.infinity();
  int exponent = format.least_exponent();
  if (magnitude > std::ldexp(1.0, exponent)) exponent = std::ilogb(magnitude);
  const double units = std::nearbyint(std::ldexp(magnitude, format.fraction_bits - exponent));
  const double bits = std::ldexp(exponent - format.least_exponent(), format.fraction_bits) + units;
  return sign | static_cast<int>(std::fmin(bits, format.infinity()));
}

template <typename Storage>
uint16_t stored(float value) {
  Storage out;
  recap::store(value, out);
  return out.bits;
}

template <typename Storage>
void check_load() {
  const Format format = kFormat<Storage>;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const double expected = decode(format, bits);
    const float found = recap::load(Storage{static_cast<uint16_t>(bits)});
    CHECK_EQ(std::signbit(found), std::signbit(expected), "pattern ", bits);
    CHECK_EQ(std::isnan(found), std::isnan(expected), "pattern ", bits);
    if (!std::isnan(expected)) CHECK_EQ(static_cast<double>(found), expected, "pattern ", bits);
  }
}

TEST(every_float16_is_loaded_exactly) { check_load<Float16>(); }
TEST(every_bfloat16_is_loaded_exactly) { check_load<BFloat16>(); }

template <typename Storage>
void check_round_trip() {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const uint16_t found = stored<Storage>(recap::load(Storage{static_cast<uint16_t>(bits)}));
    if (kFormat<Storage>.is_nan(bits)) {
      CHECK(kFormat<Storage>.is_nan(found) && kFormat<Storage>.is_quiet(found), "pattern ", bits);
    } else {
      CHECK_EQ(found, bits);
    }
  }
}

TEST(every_float16_is_stored_as_itself) { check_round_trip<Float16>(); }
TEST(every_bfloat16_is_stored_as_itself) { check_round_trip<BFloat16>(); }

// Between two neighbours, and between the largest number and what would follow it.
template <typename Storage>
void check_midpoints() {
  const Format format = kFormat<Storage>;
  for (int below = 0; below < format.infinity(); ++below) {
    const int above = below + 1;
    const double low = decode(format, below);
    const double step =
        above == format.infinity() ? low - decode(format, below - 1) : decode(format, above) - low;
    const float middle = static_cast<float>(low + step / 2);
    CHECK_EQ(static_cast<double>(middle), low + step / 2, "the test needs the midpoint exactly");
    const int even = below & 1 ? above : below;
    const float before = std::nextafter(middle, 0.0f);
    const float after = std::nextafter(middle, std::numeric_limits<float>::infinity());
    CHECK_EQ(stored<Storage>(middle), even, "midpoint ", middle);
    CHECK_EQ(stored<Storage>(before), below, "below the midpoint ", middle);
    CHECK_EQ(stored<Storage>(after), above, "above the midpoint ", middle);
    CHECK_EQ(stored<Storage>(-middle), even | 0x8000, "midpoint ", -middle);
    CHECK_EQ(stored<Storage>(-before), below | 0x8000, "above the midpoint ", -middle);
    CHECK_EQ(stored<Storage>(-after), above | 0x8000, "below the midpoint ", -middle);
  }
}

TEST(float16_midpoints_go_to_even) { check_midpoints<Float16>(); }
TEST(bfloat16_midpoints_go_to_even) { check_midpoints<BFloat16>(); }

// Floats of any pattern in turn with floats of the magnitudes that a Float16 can hold.
class RandomFloats {
 public:
  float next() {
    uint32_t bits = static_cast<uint32_t>(random_());
    anywhere_ = !anywhere_;
    if (!anywhere_) {
      constexpr uint32_t kLeast = 0x32000000, kMost = 0x48000000;  // 2^-27 and 2^17
      bits = (bits & 0x80000000) | (kLeast + (bits & 0x7fffffff) % (kMost - kLeast));
    }
    return recap::float_from_bits(bits);
  }

 private:
  std::mt19937 random_{7};
  bool anywhere_ = false;
};

constexpr int kRandomFloats = 10'000'000;

template <typename Storage>
void check_random_stores() {
  const Format format = kFormat<Storage>;
  RandomFloats floats;
  for (int i = 0; i < kRandomFloats; ++i) {
    const float value = floats.next();
    const uint16_t found = stored<Storage>(value);
    if (std::isnan(value)) {
      CHECK(format.is_nan(found) && format.is_quiet(found), value);
    } else {
      CHECK_EQ(found, encode(format, value), value);
    }
  }
}

TEST(random_floats_are_stored_as_the_nearest_float16) { check_random_stores<Float16>(); }
TEST(random_floats_are_stored_as_the_nearest_bfloat16) { check_random_stores<BFloat16>(); }

template <typename Storage>
void check_special_floats() {
  const Format format = kFormat<Storage>;
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value :
       {0.0f, -0.0f, infinity, -infinity, std::numeric_limits<float>::max(),
        std::numeric_limits<float>::lowest(), std::numeric_limits<float>::min(),
        std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::denorm_min()}) {
    CHECK_EQ(stored<Storage>(value), encode(format, value), value);
  }
  // Quiet and signalling, with the least and the greatest payload.
  for (const uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu}) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const uint16_t found = stored<Storage>(recap::float_from_bits(bits | sign));
      CHECK(format.is_nan(found) && format.is_quiet(found), "NaN ", bits | sign, " as ", found);
    }
  }
}

TEST(special_floats_are_stored_as_float16) { check_special_floats<Float16>(); }
TEST(special_floats_are_stored_as_bfloat16) { check_special_floats<BFloat16>(); }

#if defined(__FLT16_MANT_DIG__) || defined(__aarch64__)

// gcc 12 has no other name for it in C++ on aarch64.
#if defined(__aarch64__)
using CompilersHalf = __fp16;
#else
using CompilersHalf = _Float16;
#endif

TEST(float16_is_converted_as_by_the_compiler) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    CompilersHalf half;
    memcpy(&half, &pattern, sizeof half);
    const float expected = static_cast<float>(half);
    const float found = recap::load(Float16{pattern});
    if (!std::isnan(expected)) CHECK_EQ(found, expected, "pattern ", bits);
  }
  RandomFloats floats;
  for (int i = 0; i < kRandomFloats; ++i) {
    const float value = floats.next();
    const CompilersHalf half = static_cast<CompilersHalf>(value);
    uint16_t expected;
    memcpy(&expected, &half, sizeof expected);
    if (!std::isnan(value)) CHECK_EQ(stored<Float16>(value), expected, value);
  }
}

#endif

#if defined(__aarch64__)

bool has_hardware() { return true; }

void load_by_hardware(const uint16_t* from, float* to) {
  for (int i = 0; i < 8; i += 4) {
    vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  }
}

void store_by_hardware(const float* from, uint16_t* to) {
  for (int i = 0; i < 8; i += 4) {
    vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  }
}

#elif defined(__x86_64__)

bool has_hardware() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("f16c");
}

__attribute__((target("avx,f16c"))) void load_by_hardware(const uint16_t* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

__attribute__((target("avx,f16c"))) void store_by_hardware(const float* from, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}

#endif

#if defined(__aarch64__) || defined(__x86_64__)

void check_conversion_by_hardware() {
  for (int bits = 0; bits < 0x10000; bits += 8) {
    uint16_t halves[8];
    float expected[8];
    for (int i = 0; i < 8; ++i) halves[i] = static_cast<uint16_t>(bits + i);
    load_by_hardware(halves, expected);
    for (int i = 0; i < 8; ++i) {
      const float found = recap::load(Float16{halves[i]});
      CHECK_EQ(recap::float_bits(found), recap::float_bits(expected[i]), "pattern ", bits + i);
    }
  }
  RandomFloats floats;
  for (int round = 0; round < kRandomFloats / 8; ++round) {
    float values[8];
    uint16_t expected[8];
    for (float& value : values) value = floats.next();
    store_by_hardware(values, expected);
    for (int i = 0; i < 8; ++i) CHECK_EQ(stored<Float16>(values[i]), expected[i], values[i]);
  }
}

// The engine uses these instructions where it can, so NaN must agree to the bit as well.
TEST(float16_is_converted_as_by_the_processor) {
  if (!has_hardware()) throw check::Skip{"this processor has no F16C"};
  check_conversion_by_hardware();
  const recap::cpu::FlushingAs flushing(recap::cpu::kFlushBits);
  check_conversion_by_hardware();
}

#endif

}  // namespace
