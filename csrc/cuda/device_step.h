// A step whose values are computed on the device, from numbers in its memory: nothing waits for the
// host, and a launch that a CUDA graph repeats is the next step each time. Plain C++, without CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan/values.h"

namespace recap::cuda {

// One param group.
struct DeviceGroup {
  Hyper hyper;
  const void* lr = nullptr;   // if not null, one number in device memory in the place of hyper's lr
  bool lr_is_double = false;  // float64, else float32
};

// Learning-rate schedules that each step moves on: `step` grows by one, and `rates` become those
// of the new step. All of it lies in device memory.
struct RateTable {
  const double* schedules = nullptr;  // as ../plan/schedules.h describes
  double* rates = nullptr;            // one per schedule; a group's lr may point to it
  int64_t* step = nullptr;
  uint32_t count = 0;  // of schedules
};

struct DeviceStep {
  // Per slot, in the order of the plan. A slot whose gradient is null is skipped.
  std::vector<const void*> grads;
  std::vector<uint32_t> group_of_slot;  // index into `groups`
  std::vector<DeviceGroup> groups;
  const float* grad_scale = nullptr;  // in device memory; null means 1
  const float* found_inf = nullptr;   // the same; null means 0. Not 0: no tensor, no count changes
  // In device memory, one per slot: the steps that it has taken. The step adds 1 to those of slots
  // with a gradient, without elements too. 0 means that an SGD momentum buffer is new. A count must
  // be a whole number; a float stops counting at 2^24.
  float* counts = nullptr;
  const RateTable* rates = nullptr;  // moved on even if found_inf is not 0, or there is no gradient
};

}  // namespace recap::cuda
