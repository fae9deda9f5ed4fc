#include "capture_guard.h"

#include <algorithm>
#include <sstream>

#include "devices.h"

namespace recap {

bool CaptureGuard::captures(const std::vector<DevicePlan>& plans,
                            const std::vector<SlotTensors>& slots, const StepGradients& gradients,
                            bool device_values) const {
  std::vector<at::Device> captured;
  for (const DevicePlan& plan : plans) {
    if (is_capturing(plan.device())) captured.push_back(plan.device());
  }
  if (captured.empty()) return false;
  if (!device_values) {
    throw std::runtime_error(
        "a CUDA graph would repeat the learning rates and step counts of this one step: create "
        "the optimizer with capturable=True");
  }
  const auto is_captured = [&](at::Device device) {
    return std::find(captured.begin(), captured.end(), device) != captured.end();
  };
  const auto refuse = [&](const std::string& what, at::Device device) {
    throw std::runtime_error(what + " on " + device.str() +
                             " would change now, but not when the CUDA graph that is captured on " +
                             captured.front().str() +
                             " is replayed: leave what is there to an optimizer of its own, and "
                             "its steps out of the graph");
  };
  for (size_t slot = 0; slot < slots.size(); ++slot) {
    const at::Device device = slots[slot].param().device();
    if (gradients.has(slot)) {
      if (!is_captured(device)) refuse("parameter " + slots[slot].name(), device);
    } else if (stepped_last_[slot] && is_captured(device)) {
      throw std::runtime_error(
          "parameter " + slots[slot].name() +
          " has no gradient while a CUDA graph is captured, but had one in the step before: the "
          "graph would never update it. Capture the backward pass too, or call "
          "requires_grad_(False) and take a step first");
    }
  }
  for (const DevicePlan& plan : plans) {
    if (plan.rates() && !is_captured(plan.device())) refuse("the learning rates", plan.device());
  }
  return true;
}

void CaptureGuard::check_rates(std::vector<PlanGroup>& groups,
                               const std::vector<const double*>& scheduled) const {
  if (captured_rates_.empty()) return;
  for (PlanGroup& group : groups) group.reader.refresh();
  const std::vector<Rate> present = rates_of(groups);
  for (size_t i = 0; i < groups.size(); ++i) {
    const Rate& captured = captured_rates_[i];
    if (scheduled[i] || present[i] == captured) continue;
    const bool both = captured.tensor.defined() && present[i].tensor.defined();
    throw std::runtime_error(
        "the lr of " + groups[i].reader.name() + " changed from " + captured.text() + " to " +
        (both ? "another" : present[i].text()) +
        " after a CUDA graph was captured, which goes on with the former; before the capture, set "
        "a tensor on the device as lr, whose value you change, or create RecapLRShim with "
        "device_schedule=True");
  }
}

void CaptureGuard::remember(const StepGradients& gradients) {
  for (size_t slot = 0; slot < stepped_last_.size(); ++slot) {
    stepped_last_[slot] = gradients.has(slot);
  }
}

bool CaptureGuard::Rate::operator==(const Rate& other) const {
  return tensor.is_same(other.tensor) && (tensor.defined() || number == other.number);
}

std::string CaptureGuard::Rate::text() const {
  std::ostringstream text;
  tensor.defined() ? text << "a tensor on the device" : text << number;
  return text.str();
}

std::vector<CaptureGuard::Rate> CaptureGuard::rates_of(const std::vector<PlanGroup>& groups) {
  std::vector<Rate> rates;
  for (const PlanGroup& group : groups) {
    rates.push_back({group.reader.hyper().lr, group.reader.device_lr()});
  }
  return rates;
}

}  // namespace recap
