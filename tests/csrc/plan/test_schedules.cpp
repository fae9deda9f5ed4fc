// Schedules against their definitions, in long double.
#include "plan/schedules.h"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "random_schedules.h"

namespace {

double rate(const Schedule& schedule, int64_t step) {
  const std::vector<double> table = pack({{ScheduleKind::constant, {7}}, schedule});
  return recap::rate_at(table.data(), 1, step);
}

TEST(the_cosine_is_off_by_half_a_unit_of_one) {
  const long double pi = std::acos(-1.0L);
  std::mt19937_64 random(1);
  long double largest = 0;
  for (int i = 0; i < 200000; ++i) {
    double x = std::uniform_real_distribution<>(0, 1)(random);
    if (i % 3 == 1) x = std::ldexp(x, -static_cast<int>(random() % 40));
    if (i % 3 == 2) x = 1 - std::ldexp(x, -static_cast<int>(random() % 40));
    const long double error = std::fabs(recap::cos_pi(x) - std::cos(pi * x));
    largest = std::max(largest, error);
    CHECK(error <= 0x1p-53L, "at ", x, ": off by ", error);
  }
  CHECK(largest > 0.8L * 0x1p-53L, "no error came near its bound");
}

TEST(the_cosine_is_exact_where_it_must_be) {
  CHECK_EQ(recap::cos_pi(0), 1.0);
  CHECK_EQ(recap::cos_pi(0.5), 0.0);
  CHECK_EQ(recap::cos_pi(1), -1.0);
  CHECK_EQ(recap::cos_pi(0x1p-30), 1.0);
}

TEST(the_cosine_falls_and_is_symmetric) {
  double previous = 1;
  for (int i = 0; i <= 100000; ++i) {
    const double cosine = recap::cos_pi(i / 100000.0);
    CHECK(cosine <= previous, "at ", i);
    previous = cosine;
  }
  for (int i = 0; i <= 1024; ++i) {
    CHECK_EQ(recap::cos_pi(i / 1024.0), -recap::cos_pi(1 - i / 1024.0), "at ", i);
  }
}

TEST(a_constant_rate_never_changes) {
  for (const int64_t step : {0, 1, 1000000}) {
    CHECK_EQ(rate({ScheduleKind::constant, {0.3}}, step), 0.3);
  }
}

TEST(a_piece_begins_at_its_boundary) {
  const Schedule schedule = {
      ScheduleKind::piecewise_constant, {}, {10, 20, 20, 50}, {1, 2, 3, 4, 5}};
  for (const auto& [step, expected] : std::vector<std::pair<int64_t, double>>{
           {0, 1}, {9, 1}, {10, 2}, {19, 2}, {20, 4}, {49, 4}, {50, 5}, {int64_t{1} << 50, 5}}) {
    CHECK_EQ(rate(schedule, step), expected, "at step ", step);
  }
  CHECK_EQ(rate({ScheduleKind::piecewise_constant, {}, {}, {0.5}}, 3), 0.5);
  CHECK_EQ(rate({ScheduleKind::piecewise_constant, {}, {0}, {0.5, 0.25}}, 0), 0.25);
}

TEST(a_ramp_ends_at_its_rate) {
  const Schedule schedule = {ScheduleKind::linear_ramp_to_constant, {0.3, 7}};
  CHECK_EQ(rate(schedule, 0), 0.0);
  CHECK_EQ(rate(schedule, 1), 0.3 / 7);
  CHECK_EQ(rate(schedule, 6), 0.3 / 7 * 6);
  for (const int64_t step : {7, 8, 1000000}) CHECK_EQ(rate(schedule, step), 0.3);
}

TEST(a_cosine_begins_after_its_ramp_and_ends_at_its_final_rate) {
  const Schedule schedule = {ScheduleKind::linear_ramp_to_cosine, {0.3, 7, 0.1, 27}};
  CHECK_EQ(rate(schedule, 0), 0.0);
  CHECK_EQ(rate(schedule, 6), 0.3 / 7 * 6);
  CHECK_EQ(rate(schedule, 7), 0.1 + (0.3 - 0.1));
  CHECK(std::fabs(rate(schedule, 17) - 0.2) < 1e-16, "half way");
  for (const int64_t step : {27, 28, 1000000}) CHECK_EQ(rate(schedule, step), 0.1);
}

// Relative to the larger of a schedule's rates: where a cosine falls to 0, what the rate has left
// of its own digits is as much less.
TEST(rates_are_those_of_the_definitions_to_the_last_place) {
  std::mt19937_64 random(2);
  for (int run = 0; run < 200; ++run) {
    const Schedule schedule = random_schedule(random);
    const std::vector<double> table = pack({schedule});
    for (int i = 0; i < 1000; ++i) {
      const int64_t step = i < 500 ? i : static_cast<int64_t>(random() % 20000);
      const long double expected = exact_rate(schedule, step);
      const long double error = std::fabs(recap::rate_at(table.data(), 0, step) - expected);
      CHECK(error <= 4e-16L * largest_rate(schedule), "schedule ", static_cast<int>(schedule.kind),
            " at step ", step, ": off by ", error, " of ", expected);
    }
  }
}

}  // namespace
