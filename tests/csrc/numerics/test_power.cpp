// Whole powers against the long double of the mathematical library.
#include "numerics/power.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

namespace {

std::vector<double> bases() {
  std::vector<double> all = {0.8,      0.9,         0.95, 0.98,         0.99, 0.999,
                             1 - 1e-4, 1 - 1e-5,    0.5,  1 - 1e-12,    0.3,  1e-3,
                             0.75,     1 - 0x1p-53, 1.0,  0.999 + 1e-9, 0.1};
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) all.push_back(std::uniform_real_distribution<>(0.8, 1)(random));
  return all;
}

std::vector<double> exponents() {
  std::vector<double> all;
  for (int i = 0; i <= 300; ++i) all.push_back(i);
  for (double step = 1000; step <= 1e7; step *= 1.07) all.push_back(std::floor(step));
  for (const double step : {65535.0, 65536.0, 999999.0, 0x1p23 - 1, 0x1p23 + 1, 1e7}) {
    all.push_back(step);
  }
  return all;
}

double unit_in_the_last_place(double value) {
  return std::nextafter(value, std::numeric_limits<double>::infinity()) - value;
}

TEST(powers_are_rounded_correctly) {
  long double largest = 0;
  for (const double base : bases()) {
    for (const double exponent : exponents()) {
      const long double exact = std::pow(static_cast<long double>(base), exponent);
      const double found = recap::power(base, exponent);
      const double unit = unit_in_the_last_place(found);
      if (exact < 0x1p-960L) {  // the second half of a sum underflows
        CHECK(std::fabs(found - exact) <= unit, base, "^", exponent);
        continue;
      }
      const long double error = std::fabs(found - exact) / unit;
      largest = std::max(largest, error);
      // The hundredth is for long double.
      CHECK(error <= 0.51L, base, "^", exponent, " is ", found, ", off by ", error);
    }
  }
  CHECK(largest > 0.49L, "no error came near its bound");
}

TEST(powers_are_those_of_the_mathematical_library_to_one_unit) {
  for (const double base : bases()) {
    for (const double exponent : exponents()) {
      const double expected = std::pow(base, exponent);
      CHECK(std::fabs(recap::power(base, exponent) - expected) <= unit_in_the_last_place(expected),
            base, "^", exponent);
    }
  }
}

TEST(powers_that_are_known) {
  CHECK_EQ(recap::power(0.0, 1), 0.0);
  CHECK_EQ(recap::power(0.0, 1e7), 0.0);
  CHECK_EQ(recap::power(0.0, 0), 1.0);
  CHECK_EQ(recap::power(0.9, 0), 1.0);
  CHECK_EQ(recap::power(0.9, 1), 0.9);
  CHECK_EQ(recap::power(0.5, 1022), 0x1p-1022);
  CHECK_EQ(recap::power(0.5, 1074), 0x1p-1074);
  CHECK_EQ(recap::power(0.5, 1e7), 0.0);
  CHECK_EQ(recap::power(1.0, 0x1p53), 1.0);
}

TEST(an_exponent_is_rounded_down_and_never_negative) {
  CHECK_EQ(recap::power(0.9, 3.99), recap::power(0.9, 3));
  for (const double exponent : {-1.0, 0.5, -0.0, -1e300, std::numeric_limits<double>::quiet_NaN(),
                                -std::numeric_limits<double>::infinity()}) {
    CHECK_EQ(recap::power(0.9, exponent), 1.0, "to the power of ", exponent);
  }
}

TEST(an_exponent_that_no_integer_holds_leaves_nothing_of_a_base_below_one) {
  for (const double exponent : {0x1p63, 0x1p64, 1e300, std::numeric_limits<double>::infinity()}) {
    CHECK_EQ(recap::power(1 - 0x1p-53, exponent), 0.0, "to the power of ", exponent);
    CHECK_EQ(recap::power(0.0, exponent), 0.0, "to the power of ", exponent);
    CHECK_EQ(recap::power(1.0, exponent), 1.0, "to the power of ", exponent);
  }
}

}  // namespace
