// The part of a bound plan that CUDA devices step: with values from the host or computed there, and
// what a CUDA graph may capture of it.
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "bound_plan.h"
#include "devices.h"
#include "scalar.h"

namespace recap {

bool BoundPlan::is_stepped_on_device(const SlotTensors& slot) const {
  return device_values_ && !slot.is_inert() &&
         engine_for(slot.param().device()) == EngineKind::cuda;
}

void BoundPlan::check_devices() const {
  for (const Group& group : groups_) {
    const at::Tensor& lr = group.reader.device_lr();
    for (size_t i = group.begin; i < group.end; ++i) {
      if (slots_[i].is_inert()) continue;
      const at::Device device = slots_[i].param().device();
      if (group.reader.capturable() && engine_for(device) != EngineKind::cuda) {
        throw py::value_error(group.reader.name() + " has capturable=True, but its parameter " +
                              slots_[i].name() + " is on " + device.str() +
                              "; move it to a CUDA device or leave capturable off");
      }
      if (lr.defined() && lr.device() != device) {
        throw py::value_error("the lr of " + group.reader.name() + " is a tensor on " +
                              lr.device().str() + ", but its parameter " + slots_[i].name() +
                              " is on " + device.str() +
                              "; pass a number, or a group for each device");
      }
    }
  }
}

// The address of a one-element float32 tensor on `device` with the value of `number`; null for
// None. `kept` holds the tensor.
const float* BoundPlan::on_device(const py::object& number, const char* name, at::Device device,
                                  at::Tensor& kept) {
  if (number.is_none()) return nullptr;
  kept = scalar_on(number, name, device);
  return kept.const_data_ptr<float>();
}

void BoundPlan::run_device_plans(const py::object& grad_scale, const py::object& found_inf) {
  if (!device_values_) {
    for (DevicePlan& part : device_plans_) part.run(step_);
    return;
  }
  device_step_.grads = step_.grads;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const at::Tensor& lr = groups_[i].reader.device_lr();
    cuda::DeviceGroup& group = device_step_.groups[i];
    group = {groups_[i].reader.hyper(), nullptr, true};
    if (scheduled_rates_[i]) {
      group.lr = scheduled_rates_[i];
    } else if (lr.defined()) {
      group.lr = lr.const_data_ptr();
      group.lr_is_double = lr.scalar_type() == at::kDouble;
    }
  }
  for (DevicePlan& part : device_plans_) {
    at::Tensor scale, inf;
    device_step_.grad_scale = on_device(grad_scale, "grad_scale", part.device(), scale);
    device_step_.found_inf = on_device(found_inf, "found_inf", part.device(), inf);
    device_step_.counts = part.step_counts();
    device_step_.rates = part.rates();
    part.run(device_step_);
  }
}

void BoundPlan::set_schedules(const std::vector<size_t>& groups, const at::Tensor& schedules,
                              const at::Tensor& rates, const at::Tensor& epoch) {
  for (size_t i = 0; i < groups.size(); ++i) {
    scheduled_rates_.at(groups[i]) = rates.const_data_ptr<double>() + i;
  }
  for (DevicePlan& part : device_plans_) {
    if (part.device() == rates.device()) part.set_schedules(schedules, rates, epoch);
  }
}

std::vector<at::Tensor> BoundPlan::sums_of_squares(const std::vector<uint32_t>& part_of_slot,
                                                   size_t parts) {
  const Turn turn(*this);
  holds_ = gives_up_gil_;
  if (is_cleared_ || !groups_unchanged() || !read_slots()) return {};
  check_capture();
  // torch's kernel takes tensors of one device and dtype at a time.
  using Kind = std::tuple<uint32_t, at::Device, at::ScalarType>;
  const auto before = [](const Kind& a, const Kind& b) {
    const auto key = [](const Kind& kind) {
      const auto& [part, device, dtype] = kind;
      return std::tuple(part, device.type(), device.index(), dtype);
    };
    return key(a) < key(b);
  };
  std::map<Kind, std::vector<at::Tensor>, decltype(before)> gradients(before);
  at::Device device = at::kCPU;
  for (size_t i = slots_.size(); i-- > 0;) {
    if (slots_[i].is_inert()) continue;
    device = slots_[i].param().device();
    if (!has_gradient(i) || slots_[i].param().numel() == 0) continue;
    const at::Tensor grad =
        is_sparse_[i] ? probes_[i].grad().detach().coalesce().values() : slots_[i].grad().detach();
    gradients[{part_of_slot.at(i), grad.device(), grad.scalar_type()}].push_back(grad);
  }
  const auto options = at::TensorOptions(device).dtype(at::kDouble);
  std::vector<at::Tensor> sums(parts);
  for (at::Tensor& sum : sums) sum = at::zeros({}, options);
  for (const auto& [kind, tensors] : gradients) {
    const auto& [part, own_device, dtype] = kind;
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor norms = at::stack(at::_foreach_norm(tensors, 2, wide)).to(at::kDouble);
    sums[part] += norms.square().sum().to(device);
  }
  return sums;
}

bool BoundPlan::wants_device_values(const py::object& scalar) const {
  return !device_values_ && THPVariable_Check(scalar.ptr()) &&
         engine_for(THPVariable_Unpack(scalar.ptr()).device()) == EngineKind::cuda &&
         !device_plans_.empty();
}

bool BoundPlan::check_capture() const {
  std::vector<at::Device> captured;
  for (const DevicePlan& part : device_plans_) {
    if (is_capturing(part.device())) captured.push_back(part.device());
  }
  if (captured.empty()) return false;
  if (!device_values_) {
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
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    const at::Device device = slots_[slot].param().device();
    if (has_gradient(slot)) {
      if (!is_captured(device)) refuse("parameter " + slots_[slot].name(), device);
    } else if (stepped_last_[slot] && is_captured(device)) {
      throw std::runtime_error(
          "parameter " + slots_[slot].name() +
          " has no gradient while a CUDA graph is captured, but had one in the step before: the "
          "graph would never update it. Capture the backward pass too, or call "
          "requires_grad_(False) and take a step first");
    }
  }
  for (const DevicePlan& part : device_plans_) {
    if (part.rates() && !is_captured(part.device())) refuse("the learning rates", part.device());
  }
  return true;
}

bool BoundPlan::Rate::operator==(const Rate& other) const {
  return tensor.is_same(other.tensor) && (tensor.defined() || number == other.number);
}

std::string BoundPlan::Rate::text() const {
  std::ostringstream text;
  tensor.defined() ? text << "a tensor on the device" : text << number;
  return text.str();
}

std::vector<BoundPlan::Rate> BoundPlan::rates() const {
  std::vector<Rate> rates;
  for (const Group& group : groups_) {
    rates.push_back({group.reader.hyper().lr, group.reader.device_lr()});
  }
  return rates;
}

void BoundPlan::check_captured_rates() {
  if (captured_rates_.empty()) return;
  for (Group& group : groups_) group.reader.refresh();
  const std::vector<Rate> present = rates();
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Rate& captured = captured_rates_[i];
    if (scheduled_rates_[i] || present[i] == captured) continue;
    const bool both = captured.tensor.defined() && present[i].tensor.defined();
    throw std::runtime_error(
        "the lr of " + groups_[i].reader.name() + " changed from " + captured.text() + " to " +
        (both ? "another" : present[i].text()) +
        " after a CUDA graph was captured, which goes on with the former; before the capture, set "
        "a tensor on the device as lr, whose value you change, or create RecapLRShim with "
        "device_schedule=True");
  }
}

}  // namespace recap
