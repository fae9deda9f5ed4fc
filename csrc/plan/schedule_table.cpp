#include "schedule_table.h"

#include "schedules.h"

namespace recap {
namespace {

void add(std::vector<double>& records, ScheduleKind kind, std::vector<double> arguments) {
  arguments.resize(kScheduleSize - 1);
  records.push_back(static_cast<double>(static_cast<int>(kind)));
  records.insert(records.end(), arguments.begin(), arguments.end());
}

}  // namespace

void ScheduleTable::add_constant(double rate) { add(records_, ScheduleKind::constant, {rate}); }

void ScheduleTable::add_piecewise_constant(const std::vector<double>& boundaries,
                                           const std::vector<double>& rates) {
  with_pieces_.push_back(records_.size() + 1);
  add(records_, ScheduleKind::piecewise_constant,
      {static_cast<double>(pieces_.size()), static_cast<double>(boundaries.size())});
  pieces_.insert(pieces_.end(), boundaries.begin(), boundaries.end());
  pieces_.insert(pieces_.end(), rates.begin(), rates.end());
}

void ScheduleTable::add_linear_ramp_to_constant(double rate, double ramp) {
  add(records_, ScheduleKind::linear_ramp_to_constant, {rate, ramp});
}

void ScheduleTable::add_linear_ramp_to_cosine(double rate, double ramp, double final_rate,
                                              double final_step) {
  add(records_, ScheduleKind::linear_ramp_to_cosine, {rate, ramp, final_rate, final_step});
}

std::vector<double> ScheduleTable::numbers() const {
  std::vector<double> table = records_;
  for (const size_t place : with_pieces_) table[place] += static_cast<double>(records_.size());
  table.insert(table.end(), pieces_.begin(), pieces_.end());
  return table;
}

}  // namespace recap
