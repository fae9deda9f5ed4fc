// Lion: the update of one element.
//
// Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), Algorithm 2,
// with decoupled weight decay. The averages round once each, as Adam's do.
#pragma once

#include "../numerics/arithmetic.h"
#include "traits.h"

namespace recap {

struct LionHyper {
  double beta1, beta2, weight_decay;
};

template <typename T>
struct LionValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T decay;        // what the weight decay leaves of the parameter
  T blend;        // lerp factor of what the sign is taken of
  T average;      // lerp factor of exp_avg
  T minus_lr;
};

RECAP_INLINE LionValues<double> lion_values(const LionHyper& h, const StepInputs& inputs,
                                            double grad_factor) {
  return {
      grad_factor,
      1.0 - inputs.lr * h.weight_decay,
      lerp_factor(1.0 - h.beta1),
      lerp_factor(1.0 - h.beta2),
      -inputs.lr,
  };
}

RECAP_INLINE LionValues<float> to_float(const LionValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor), static_cast<float>(h.decay),
      static_cast<float>(h.blend),       static_cast<float>(h.average),
      static_cast<float>(h.minus_lr),
  };
}

struct Lion {
  static constexpr int kStates = 1;
  static constexpr unsigned kNeverNegative = 0;
  template <typename T>
  using Values = LionValues<T>;

  template <typename S, typename T>
  static RECAP_INLINE void update(const LionValues<S>& h, T grad, T& param, T* state) {
    const T g = grad * h.grad_factor;
    T& m = state[0];
    const T distance = g - m;
    const T blended = fma(h.blend, distance, h.blend > 0 ? m : g);
    m = fma(h.average, distance, h.average > 0 ? m : g);
    // Of zero it is zero, and of NaN NaN, which torch.sign would hide.
    const T sign = select(blended > S(0), T(S(1)), select(blended < S(0), T(S(-1)), blended));
    param = fma(h.minus_lr, sign, param * h.decay);
  }
};

struct LionTraits {
  using Hyper = LionHyper;
  template <typename T>
  using Values = LionValues<T>;

  static constexpr Option kOptions[] = {
      {"betas", OptionKind::decay_rates, offsetof(LionHyper, beta1)},
      {"weight_decay", OptionKind::number, offsetof(LionHyper, weight_decay)},
  };
  static constexpr bool kCounts = false;
  static constexpr bool kTakesSparse = false;

  static StateNames states(const LionHyper&) { return StateNames("exp_avg"); }
  static int shape(const LionHyper&) { return 0; }

  template <typename Update>
  static RECAP_INLINE Update update(const LionHyper&) {
    return Update::lion;
  }
  template <typename Correction>
  static RECAP_INLINE LionValues<double> values(const LionHyper& h, const StepInputs& inputs,
                                                double grad_factor, Correction&&) {
    return lion_values(h, inputs, grad_factor);
  }
};

}  // namespace recap
