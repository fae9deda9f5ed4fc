// Whole powers of a decay rate, which bias corrections need, with the same bits on host and device.
// The mathematical libraries differ in the last place there, and a difference in 1 - beta^step is
// as much larger as that is smaller.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace recap {

// The sum of two numbers, of which the first is what the sum rounds to.
struct DoubleDouble {
  double high, low;
};

// With a relative error of some 2^-104 unless it underflows.
RECAP_INLINE DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const double product = a.high * b.high;
  const double rest = fma(a.high, b.high, -product) + fma(a.high, b.low, a.low * b.high);
  const double high = product + rest;
  return {high, rest - (high - product)};
}

// base^exponent for a base from 0 to 1, by squaring: rounded correctly but in the rarest cases,
// since what it rounds is off by less than 2^-70 of itself for exponents up to 2^30; below 2^-960
// within one unit in the last place. An exponent that is not a whole number is rounded down, and
// counts as 0 if it is negative or NaN. From 2^63 on, no power of a base below 1 is a number but 0.
RECAP_INLINE double power(double base, double exponent) {
  if (exponent >= 0x1p63) return base < 1.0 ? 0.0 : base;
  uint64_t left = exponent >= 1.0 ? static_cast<uint64_t>(exponent) : 0;
  DoubleDouble result = {1.0, 0.0}, square = {base, 0.0};
  for (;;) {
    if (left & 1) result = multiply(result, square);
    left >>= 1;
    if (left == 0) return result.high;
    square = multiply(square, square);
  }
}

}  // namespace recap
