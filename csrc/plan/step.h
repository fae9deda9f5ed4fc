// What changes from step to step: gradient addresses, and the values computed from each group's
// hyperparameters and each slot's step count.
#pragma once

#include <cstdint>
#include <vector>

#include "../algorithms/updates.h"

namespace recap {

enum class Algorithm : uint8_t { adam, adagrad, sgd };

// The hyperparameters of one group.
struct Hyper {
  Algorithm algorithm = Algorithm::adam;
  bool maximize = false;
  union {
    AdamHyper adam;
    AdagradHyper adagrad;
    SgdHyper sgd;
  };
  Hyper() : adam{} {}
};

// One update with its values, for slots that compute in float or in double.
struct Values {
  Update update;
  UpdateValues<float> float32;
  UpdateValues<double> float64;

  template <typename T>
  const UpdateValues<T>& in() const;
};
template <>
RECAP_INLINE const UpdateValues<float>& Values::in<float>() const {
  return float32;
}
template <>
RECAP_INLINE const UpdateValues<double>& Values::in<double>() const {
  return float64;
}

// `step` counts from 1; `first` says that an SGD momentum buffer is new; gradients are divided by
// `grad_scale`.
Values make_values(const Hyper& hyper, double step, bool first, double grad_scale);

struct Step {
  // Per slot, in the order of the plan. A slot whose gradient is null is skipped.
  std::vector<const void*> grads;
  std::vector<uint32_t> values_of_slot;  // index into `values`
  std::vector<Values> values;
};

}  // namespace recap
