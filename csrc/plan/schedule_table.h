// Schedules, packed into the table of numbers that schedules.h describes.
#pragma once

#include <cstddef>
#include <vector>

namespace recap {

class ScheduleTable {
 public:
  // One schedule more. Lengths and boundaries are in steps.
  void add_constant(double rate);
  // `rates` has one more than `boundaries`, which ascend.
  void add_piecewise_constant(const std::vector<double>& boundaries,
                              const std::vector<double>& rates);
  void add_linear_ramp_to_constant(double rate, double ramp);
  void add_linear_ramp_to_cosine(double rate, double ramp, double final_rate, double final_step);

  // The table of all of them.
  std::vector<double> numbers() const;

 private:
  std::vector<double> records_, pieces_;
  std::vector<size_t> with_pieces_;  // in `records_`: where pieces begin, counted from the first
};

}  // namespace recap
