// Schedules for tests, and their definitions in long double.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "plan/schedule_table.h"
#include "plan/schedules.h"

using recap::ScheduleKind;

struct Schedule {
  ScheduleKind kind;
  std::vector<double> arguments;  // but for a piecewise constant one, which has these
  std::vector<double> boundaries = {}, pieces = {};
};

inline std::vector<double> pack(const std::vector<Schedule>& schedules) {
  recap::ScheduleTable table;
  for (const Schedule& each : schedules) {
    const std::vector<double>& arguments = each.arguments;
    switch (each.kind) {
      case ScheduleKind::constant: table.add_constant(arguments.at(0)); break;
      case ScheduleKind::piecewise_constant:
        table.add_piecewise_constant(each.boundaries, each.pieces);
        break;
      case ScheduleKind::linear_ramp_to_constant:
        table.add_linear_ramp_to_constant(arguments.at(0), arguments.at(1));
        break;
      case ScheduleKind::linear_ramp_to_cosine:
        table.add_linear_ramp_to_cosine(arguments.at(0), arguments.at(1), arguments.at(2),
                                        arguments.at(3));
        break;
    }
  }
  return table.numbers();
}

inline long double exact_rate(const Schedule& schedule, int64_t step) {
  if (schedule.kind == ScheduleKind::piecewise_constant) {
    size_t piece = 0;
    for (const double boundary : schedule.boundaries) piece += boundary <= step;
    return schedule.pieces[piece];
  }
  const long double rate = schedule.arguments[0];
  if (schedule.kind == ScheduleKind::constant) return rate;
  const long double ramp = schedule.arguments[1];
  if (step < ramp) return rate * step / ramp;
  if (schedule.kind == ScheduleKind::linear_ramp_to_constant) return rate;
  const long double final_rate = schedule.arguments[2], final_step = schedule.arguments[3];
  if (step >= final_step) return final_rate;
  const long double angle = std::acos(-1.0L) * (step - ramp) / (final_step - ramp);
  return final_rate + (rate - final_rate) * (1 + std::cos(angle)) / 2;
}

inline double largest_rate(const Schedule& schedule) {
  if (schedule.kind == ScheduleKind::piecewise_constant) {
    return *std::max_element(schedule.pieces.begin(), schedule.pieces.end());
  }
  const bool cosine = schedule.kind == ScheduleKind::linear_ramp_to_cosine;
  return std::max(schedule.arguments[0], cosine ? schedule.arguments[2] : 0.0);
}

inline Schedule random_schedule(std::mt19937_64& random) {
  const auto rate = [&] { return std::uniform_real_distribution<>(0, 1)(random); };
  const auto steps = [&](int most) { return static_cast<double>(1 + random() % most); };
  switch (random() % 4) {
    case 0: return {ScheduleKind::constant, {rate()}};
    case 1: {
      Schedule schedule = {ScheduleKind::piecewise_constant, {}, {}, {rate()}};
      for (int i = static_cast<int>(random() % 6); i > 0; --i) {
        schedule.boundaries.push_back(steps(1000));
        schedule.pieces.push_back(rate());
      }
      std::sort(schedule.boundaries.begin(), schedule.boundaries.end());
      return schedule;
    }
    case 2: return {ScheduleKind::linear_ramp_to_constant, {rate(), steps(400)}};
    default: {
      const double ramp = steps(400), final_rate = random() % 2 ? rate() : 0.0;
      return {ScheduleKind::linear_ramp_to_cosine, {rate(), ramp, final_rate, ramp + steps(15000)}};
    }
  }
}
