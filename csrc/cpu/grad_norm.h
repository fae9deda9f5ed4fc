// The squared norm of a step's gradients.
#pragma once

#include <cstddef>
#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "thread_pool.h"

namespace recap::cpu {

class GradNorm {
 public:
  // Returns, for each part, the sum of squares of its gradients: those of the slots for which
  // `part_of_slot` gives its number. Sums are formed in double, and over tiles in twice that, so
  // that neither threads nor the order of the groups show in them. Of a sparse gradient, whose
  // lookups are sorted, the sums of each row's lookups count.
  const std::vector<double>& sums_of_squares(const Plan& plan, const Step& step,
                                             const std::vector<uint32_t>& part_of_slot,
                                             size_t parts, const ThreadPool& pool);

 private:
  // Kept, so that a step allocates nothing.
  std::vector<double> of_tile_, of_rows_;
  std::vector<size_t> ends_;
  std::vector<double> sums_, errors_;  // of each part
};

}  // namespace recap::cpu
