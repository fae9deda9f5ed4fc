// Gradients scaled down to a global norm that the host computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../cpu/grad_norm.h"
#include "python.h"

namespace recap {

class HostClipping {
 public:
  HostClipping() = default;

  // The squares of gradients are summed by `parts`, the one of each slot in `part_of_slot`, and
  // `total` maps the list of sums to the sum over all processes; None adds them up.
  HostClipping(double max_norm, std::vector<uint32_t> part_of_slot, size_t parts, py::object total)
      : max_norm_(max_norm),
        part_of_slot_(std::move(part_of_slot)),
        parts_(parts),
        total_(std::move(total)) {}

  bool is_on() const { return max_norm_ > 0.0; }
  bool calls_python() const { return is_on() && !total_.is_none(); }

  // What to multiply gradients by: max_norm / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_
  // does, and at most 1. NaN: no process is to take the step.
  double factor(const Plan& plan, const Step& step, double grad_scale, bool found_inf,
                bool gives_up_gil);

  // The norm that was found last, before clipping.
  double norm() const { return norm_; }

  const py::object& total() const { return total_; }

 private:
  double max_norm_ = 0.0;  // 0: off
  std::vector<uint32_t> part_of_slot_;
  size_t parts_ = 0;
  py::object total_;
  double norm_ = 0.0;
  cpu::GradNorm sums_;
};

}  // namespace recap
