// Gradients of a scaled loss, divided by the scale in place after a step has read them.
#pragma once

#include <vector>

#include "python.h"

namespace recap {

struct ScaledGradient {
  at::Tensor whole;  // as the parameter has it
  at::Tensor local;  // the local shard of a DTensor; any other gradient itself
};

// Multiplies every element by the reciprocal of `scale`, rounded to float32, by the operator that
// torch.amp.GradScaler.unscale_ calls: the result has the same bits. Memory that several gradients
// share is multiplied once. If `found_inf` is not 0, the values stay; both are one-element tensors
// or numbers, `found_inf` may be None. Waits for no device that has both.
void unscale_gradients(const std::vector<ScaledGradient>& gradients, const py::object& scale,
                       const py::object& found_inf);

}  // namespace recap
