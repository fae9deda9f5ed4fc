// The values that one step uses of a group's hyperparameters, computed by the same code on host and
// device, to the same bits.
#pragma once

#include <cstdint>
#include <new>

#include "../algorithms/updates.h"

namespace recap {

// The hyperparameters of one group.
struct Hyper {
  Algorithm algorithm = Algorithm::adam;
  bool maximize = false;
  bool sparse_only = false;   // refuses dense gradients, as torch.optim.SparseAdam does
  bool clears_grads = false;  // a step leaves them at zero
  double lr = 0.0;
  union {
#define RECAP_HYPER_OF(name, Traits) Traits::Hyper name;
    RECAP_ALGORITHMS(RECAP_HYPER_OF)
#undef RECAP_HYPER_OF
  };
  Hyper() : adam{} {}

  // Whether whole rows are updated, or left alone if their gradient is zero.
  RECAP_INLINE bool by_rows() const {
    return algorithm == Algorithm::rowwise_adagrad || (algorithm == Algorithm::adam && adam.lazy);
  }

 private:
  template <typename Self, typename Visit>
  static auto visit_in(Self& self, Visit&& visit) {
#define RECAP_CASE(name, Traits) \
  case Algorithm::name: return visit(Traits(), self.name);
    switch (self.algorithm) { RECAP_ALGORITHMS(RECAP_CASE) }
#undef RECAP_CASE
    return visit(AdamTraits(), self.adam);  // not reached: every case is named
  }

 public:
  // `visit(traits, options)`, of the algorithm.
  template <typename Visit>
  auto visit(Visit&& visit) const {
    return visit_in(*this, visit);
  }
  template <typename Visit>
  auto visit(Visit&& visit) {
    return visit_in(*this, visit);
  }
  StateNames state_names() const {
    return visit([](auto traits, const auto& h) { return traits.states(h); });
  }
  int shape() const {
    return visit([](auto traits, const auto& h) { return traits.shape(h); });
  }
  bool counts() const {
    return visit([](auto traits, const auto&) { return traits.kCounts; });
  }
  bool takes_sparse() const {
    return visit([](auto traits, const auto&) { return traits.kTakesSparse; });
  }
};

// One update with its values, for slots that compute in float or in double.
struct Values {
  Update update;
  bool clears_grads;
  uint64_t step;  // what chances depend on; see numerics/rounding.h
  UpdateValues<float> float32;
  UpdateValues<double> float64;
  Values() {}  // without zeroes, which would be most of the writing

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

// What gradients are multiplied by, to be divided by `grad_scale` as torch.amp.GradScaler does it,
// by a reciprocal rounded to float, and multiplied by `clip`.
RECAP_INLINE double gradient_factor(double grad_scale, double clip) {
  return static_cast<float>(divide(1.0, grad_scale)) * clip;
}

// Writes to `out`: returned, a union would take a detour through the memory of a device thread.
// `correction(beta, step)` computes what `bias_correction` does.
template <typename Correction>
RECAP_INLINE void compute_values(const Hyper& hyper, const StepInputs& inputs,
                                 Correction&& correction, Values& out) {
  const double grad_factor = hyper.maximize ? -inputs.factor : inputs.factor;
  out.clears_grads = hyper.clears_grads;
  out.step = static_cast<uint64_t>(inputs.step);
#define RECAP_CASE(name, Traits)                                                               \
  case Algorithm::name: {                                                                      \
    out.update = Traits::update<Update>(hyper.name);                                           \
    new (&out.float64.name) auto(Traits::values(hyper.name, inputs, grad_factor, correction)); \
    out.float32.name = to_float(out.float64.name);                                             \
    break;                                                                                     \
  }
  switch (hyper.algorithm) { RECAP_ALGORITHMS(RECAP_CASE) }
#undef RECAP_CASE
}

}  // namespace recap
