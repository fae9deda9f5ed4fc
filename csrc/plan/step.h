// What changes from step to step: gradient addresses, and the values computed from each group's
// hyperparameters and each slot's step count.
#pragma once

#include <cstdint>
#include <vector>

#include "lookups.h"
#include "values.h"

namespace recap {

// `step` counts from 1; `first` says that an SGD momentum buffer is new; gradients are divided by
// `grad_scale` and multiplied by `clip`.
Values make_values(const Hyper& hyper, double step, bool first, double grad_scale,
                   double clip = 1.0);

// Has Adam add eps before its bias correction instead of behind it, as torch.optim.SparseAdam does:
// the "epsilon hat" of Kingma & Ba.
void add_eps_before_correction(Values& values);

// Computes the same. Groups mostly share decay rates and step counts, whose bias corrections take
// longer than all else: it remembers the last ones.
class ValuesMaker {
 public:
  // Writes to `out`: a value just written field by field is slow to copy as a whole.
  void make(const Hyper& hyper, double step, bool first, double factor, Values& out);

 private:
  struct Known {
    double beta = 0.0, step = 1.0;
    BiasCorrection correction = bias_correction(0.0, 1.0);
  };
  const BiasCorrection& correction(double beta, double step);

  static constexpr int kRemembered = 8;
  Known known_[kRemembered];
  int oldest_ = 0;
};

// The gradient of the rows of one slot that were looked up, some perhaps several times.
struct SparseGradient {
  uint32_t slot;
  int64_t row_size;    // elements
  const void* values;  // of the slot's dtype, the row of each lookup after that of the one before
  Lookups* lookups;
};

struct Step {
  // Per slot, in the order of the plan. A slot whose gradient is null is skipped, but for `sparse`.
  std::vector<const void*> grads;
  std::vector<SparseGradient> sparse;
  std::vector<uint32_t> values_of_slot;  // index into `values`
  std::vector<Values> values;
};

}  // namespace recap
