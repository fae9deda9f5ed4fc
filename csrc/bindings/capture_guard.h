// What a CUDA graph may capture of a plan's steps, and what must then stay as it was captured.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "device_plan.h"
#include "plan_group.h"
#include "slot_tensors.h"
#include "step_gradients.h"

namespace recap {

class CaptureGuard {
 public:
  void resize(size_t slots) { stepped_last_.assign(slots, 0); }

  // Whether this step is captured. Raises RuntimeError if a part of it would not be, or not
  // rightly.
  bool captures(const std::vector<DevicePlan>& plans, const std::vector<SlotTensors>& slots,
                const StepGradients& gradients, bool device_values) const;

  // A step is captured, with the learning rates that the groups have now.
  void capture(const std::vector<PlanGroup>& groups) { captured_rates_ = rates_of(groups); }
  bool has_captured() const { return !captured_rates_.empty(); }
  void clear() { captured_rates_.clear(); }

  // Raises RuntimeError if a learning rate on the host, or the tensor that has it, is not the one
  // that was captured. Those that are scheduled on the device, whose address is not null, may move.
  void check_rates(std::vector<PlanGroup>& groups,
                   const std::vector<const double*>& scheduled) const;

  // After a step.
  void remember(const StepGradients& gradients);

 private:
  // A group's learning rate: a number, or NaN and a tensor on the device.
  struct Rate {
    double number;
    at::Tensor tensor;

    bool operator==(const Rate& other) const;
    std::string text() const;
  };

  static std::vector<Rate> rates_of(const std::vector<PlanGroup>& groups);

  std::vector<Rate> captured_rates_;  // one per group; empty: no graph captured this plan
  std::vector<char> stepped_last_;    // had a gradient in the last step
};

}  // namespace recap
