// Learning-rate schedules, evaluated where the step runs: the four kinds of
// recap_fast.schedules.compute, to the last place but for the cosine, which the mathematical
// library of a host may round otherwise.
//
// Schedules come as one table of doubles, which holds whole numbers up to 2^53 exactly:
// kScheduleSize numbers for each, the kind and its arguments, and behind them the pieces of those
// that have some.
//
//   constant                  rate
//   piecewise constant        where its pieces begin in the table, boundaries; there, `boundaries`
//                             ascending steps, and then one rate more
//   linear ramp to constant   rate, steps of the ramp
//   linear ramp to cosine     rate, steps of the ramp, final rate, step at which it is reached
#pragma once

#include <cstdint>

#include "../numerics/arithmetic.h"

namespace recap {

enum class ScheduleKind {
  constant,
  piecewise_constant,
  linear_ramp_to_constant,
  linear_ramp_to_cosine
};
constexpr int kScheduleSize = 5;

// cos(pi x) for x from 0 to 1, off by at most 2^-53: the Taylor series of the cosine or the sine
// about the nearest of 0, 1/2 and 1, whose remainder is below 3e-18.
RECAP_INLINE double cos_pi(double x) {
  const double from_end = x <= 0.5 ? x : 1.0 - x;  // exact
  double cosine;
  if (from_end <= 0.25) {
    const double square = from_end * from_end;
    double series = 4.303069587032947e-06;
    series = fma(series, square, -0.0001046381049248457);
    series = fma(series, square, 0.0019295743094039231);
    series = fma(series, square, -0.02580689139001406);
    series = fma(series, square, 0.2353306303588932);
    series = fma(series, square, -1.3352627688545895);
    series = fma(series, square, 4.0587121264167685);
    series = fma(series, square, -4.934802200544679);
    cosine = fma(series, square, 1.0);
  } else {
    const double from_middle = 0.5 - from_end;  // exact
    const double square = from_middle * from_middle;
    double series = 7.952054001475513e-07;
    series = fma(series, square, -2.1915353447830217e-05);
    series = fma(series, square, 0.00046630280576761255);
    series = fma(series, square, -0.0073704309457143504);
    series = fma(series, square, 0.08214588661112823);
    series = fma(series, square, -0.5992645293207921);
    series = fma(series, square, 2.5501640398773455);
    series = fma(series, square, -5.16771278004997);
    series = fma(series, square, 1.2246467991473532e-16);  // what pi has beyond a double
    cosine = fma(from_middle, 3.141592653589793, from_middle * series);
  }
  return x <= 0.5 ? cosine : -cosine;
}

RECAP_INLINE double piece_at(const double* boundaries, int64_t count, double step) {
  int64_t first = 0, last = count;  // the number of boundaries at or before `step`
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (boundaries[middle] <= step) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return boundaries[count + first];
}

RECAP_INLINE double ramp_to_cosine_at(double rate, double ramp, double final_rate,
                                      double final_step, double step) {
  if (step < ramp) return divide(rate, ramp) * step;
  if (step > final_step) return final_rate;
  const double share_left = 0.5 * (1.0 + cos_pi(divide(step - ramp, final_step - ramp)));
  return final_rate + (rate - final_rate) * share_left;
}

// The rate of one schedule of `table` after `step` steps.
RECAP_INLINE double rate_at(const double* table, int64_t schedule, int64_t step) {
  const double* const arguments = table + schedule * kScheduleSize + 1;
  const double at = static_cast<double>(step);
  switch (static_cast<ScheduleKind>(static_cast<int>(arguments[-1]))) {
    case ScheduleKind::constant: break;
    case ScheduleKind::piecewise_constant:
      return piece_at(table + static_cast<int64_t>(arguments[0]),
                      static_cast<int64_t>(arguments[1]), at);
    case ScheduleKind::linear_ramp_to_constant: {
      const double ramped = divide(arguments[0], arguments[1]) * at;
      return ramped < arguments[0] ? ramped : arguments[0];
    }
    case ScheduleKind::linear_ramp_to_cosine:
      return ramp_to_cosine_at(arguments[0], arguments[1], arguments[2], arguments[3], at);
  }
  return arguments[0];
}

}  // namespace recap
