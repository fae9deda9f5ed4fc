// Schedules for tests: packed as csrc/plan/schedules.h describes, and their definitions in
// long double.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "plan/schedules.h"

using recap::ScheduleKind;

struct Schedule {
  ScheduleKind kind;
  std::vector<double> arguments;  // as packed, but for a piecewise constant one, which has these
  std::vector<double> boundaries = {}, pieces = {};
};

inline std::vector<double> pack(const std::vector<Schedule>& schedules) {
  std::vector<double> table(schedules.size() * recap::kScheduleSize);
  for (size_t i = 0; i < schedules.size(); ++i) {
    const Schedule& schedule = schedules[i];
    std::vector<double> arguments = schedule.arguments;
    if (schedule.kind == ScheduleKind::piecewise_constant) {
      arguments = {static_cast<double>(table.size()),
                   static_cast<double>(schedule.boundaries.size())};
      table.insert(table.end(), schedule.boundaries.begin(), schedule.boundaries.end());
      table.insert(table.end(), schedule.pieces.begin(), schedule.pieces.end());
    }
    const auto record = table.begin() + static_cast<int64_t>(i * recap::kScheduleSize);
    *record = static_cast<double>(static_cast<int>(schedule.kind));
    std::copy(arguments.begin(), arguments.end(), record + 1);
  }
  return table;
}

inline long double exact_rate(const Schedule& schedule, int64_t epoch) {
  if (schedule.kind == ScheduleKind::piecewise_constant) {
    size_t piece = 0;
    for (const double boundary : schedule.boundaries) piece += boundary <= epoch;
    return schedule.pieces[piece];
  }
  const long double rate = schedule.arguments[0];
  if (schedule.kind == ScheduleKind::constant) return rate;
  const long double ramp = schedule.arguments[1];
  if (epoch < ramp) return rate * epoch / ramp;
  if (schedule.kind == ScheduleKind::linear_ramp_to_constant) return rate;
  const long double final_rate = schedule.arguments[2], final_epoch = schedule.arguments[3];
  if (epoch >= final_epoch) return final_rate;
  const long double angle = std::acos(-1.0L) * (epoch - ramp) / (final_epoch - ramp);
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
