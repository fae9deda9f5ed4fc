#include "device_plan.h"

#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "devices.h"

namespace recap {
namespace {

Plan plan_of(const std::vector<Slot>& slots) { return {slots, cut_tiles(slots, cuda::kTileSize)}; }

template <typename Step>
void run_on(at::Device device, cuda::Engine& engine, const Step& step, void* stream) {
  // Going back to a device without a context, torch's guard makes none there.
  const c10::DeviceGuard guard(device);
  py::gil_scoped_release release;  // a launch waits while the queue of the device is full
  engine.run(step, stream);
}

}  // namespace

DevicePlan::DevicePlan(at::Device device, const std::vector<Slot>& slots) : device_(device) {
  const c10::DeviceGuard guard(device);
  engine_ =
      std::make_unique<cuda::Engine>(device_number(device), plan_of(slots), current_stream(device));
}

void DevicePlan::run(const Step& step) { run_on(device_, *engine_, step, current_stream(device_)); }

void DevicePlan::run(const cuda::DeviceStep& step) {
  void* const stream = current_stream(device_);
  if (stream != last_stream_ && !is_capturing(device_)) {
    for (const at::Tensor& tensor : {counts_, schedules_, rates_, step_}) {
      if (tensor.defined()) keep_for_current_stream(tensor);
    }
    last_stream_ = stream;
  }
  run_on(device_, *engine_, step, stream);
}

void DevicePlan::refuse_capture(at::Device device) {
  if (is_capturing(device)) {
    throw std::runtime_error(
        "the optimizer must build its plan before a CUDA graph is captured: take a step with the "
        "same parameters and gradients first, and change neither param groups nor state after it");
  }
}

DevicePlan::~DevicePlan() = default;
DevicePlan::DevicePlan(DevicePlan&&) noexcept = default;

void DevicePlan::set_schedules(const at::Tensor& schedules, const at::Tensor& rates,
                               const at::Tensor& step) {
  // Made on whichever stream; `run` takes care of those to come.
  for (const at::Tensor& tensor : {schedules, rates, step}) keep_for_current_stream(tensor);
  schedules_ = schedules;
  rates_ = rates;
  step_ = step;
  rate_table_ = {schedules.const_data_ptr<double>(), rates.mutable_data_ptr<double>(),
                 step.mutable_data_ptr<int64_t>(), static_cast<uint32_t>(rates.numel())};
}

void DevicePlan::take_step_counts(std::vector<SlotTensors>& slots,
                                  const std::vector<char>& is_new) {
  const auto size = static_cast<int64_t>(slots.size());
  // Slots that do not count, SGD's, have a count of their own all the same: it tells the kernel
  // whether the momentum buffer is new.
  at::Tensor host = at::zeros({size}, at::kFloat);
  auto* const values = host.mutable_data_ptr<float>();
  for (size_t i = 0; i < slots.size(); ++i) {
    const at::Tensor& step = slots[i].step_count();
    if (!step.defined()) {
      values[i] = is_new[i] ? 0.0f : 1.0f;
    } else if (step.device().is_cpu()) {
      values[i] = step.item().toFloat();
    }
  }
  counts_ = host.to(device_);
  last_stream_ = current_stream(device_);
  for (size_t i = 0; i < slots.size(); ++i) {
    const at::Tensor step = slots[i].step_count();
    if (!step.defined() || slots[i].param().device() != device_) continue;
    const at::Tensor count = counts_.select(0, static_cast<int64_t>(i));
    if (!step.device().is_cpu()) {
      count.copy_(step.reshape({}));
      keep_for_current_stream(step);
    }
    slots[i].set_step_count(count);
  }
}

}  // namespace recap
