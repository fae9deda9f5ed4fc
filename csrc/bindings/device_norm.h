// The squared norm of a step's gradients, computed on CUDA devices by torch's own kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "probe.h"
#include "python.h"
#include "slot_tensors.h"
#include "step_gradients.h"

namespace recap {

// The sum of squares of each part's gradients, those of the slots for which `part_of_slot` gives
// its number: float64 tensors on the device of the first slot.
std::vector<at::Tensor> sums_of_squares(const std::vector<SlotTensors>& slots,
                                        std::vector<Probe>& probes, const StepGradients& gradients,
                                        const std::vector<uint32_t>& part_of_slot, size_t parts);

}  // namespace recap
