// The slots of a plan that are on one CUDA device, with the engine that runs them.
#pragma once

#include <memory>
#include <vector>

#include "../cuda/engine.h"
#include "../plan/step.h"
#include "group_reader.h"
#include "python.h"
#include "slot_tensors.h"

namespace recap {

class DevicePlan {
 public:
  // Raises RuntimeError while torch's current stream of the device is being captured: a plan takes
  // memory and copies, which the graph would take in place of the plan.
  static void refuse_capture(at::Device device);

  // `slots` are those of the plan, with size 0 where they are on another device.
  DevicePlan(at::Device device, const std::vector<Slot>& slots);
  ~DevicePlan();
  DevicePlan(DevicePlan&&) noexcept;

  at::Device device() const { return device_; }

  // Moves the step counts to the device, for a step whose values are computed there. `is_new` says
  // of each slot that its momentum buffer is new.
  void take_step_counts(std::vector<SlotTensors>& slots, const std::vector<char>& is_new);

  // Runs a step with values from the host, or with those that the device computes.
  void run(const Step& step);
  void run(const cuda::DeviceStep& step);

  // From now on every step moves these schedules on: float64 `schedules` as a cuda::RateTable
  // describes, float64 `rates` and an int64 `step`, all on this device.
  void set_schedules(const at::Tensor& schedules, const at::Tensor& rates, const at::Tensor& step);

  // What of a device step is this part's own; the rest is the plan's.
  float* step_counts() const { return counts_.mutable_data_ptr<float>(); }
  const cuda::RateTable* rates() const { return rates_.defined() ? &rate_table_ : nullptr; }

 private:
  at::Device device_;
  std::unique_ptr<cuda::Engine> engine_;
  at::Tensor counts_;  // float32, one per slot of the plan
  at::Tensor schedules_, rates_, step_;
  void* last_stream_ = nullptr;  // that used these
  cuda::RateTable rate_table_;
};

}  // namespace recap
