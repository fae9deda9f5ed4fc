// Adam and AdamW: the update of one element.
//
// Kingma & Ba, "Adam: A Method for Stochastic Optimization" (arXiv:1412.6980); decoupled decay from
// Loshchilov & Hutter (arXiv:1711.05101); amsgrad from Reddi et al. (ICLR 2018). Arguments and
// results are those of torch.optim.Adam and AdamW.
//
// Two forms differ from torch's kernels, both to round less often:
//  * exp_avg_sq moves by a lerp, like exp_avg. In torch's `beta2 * v + (1 - beta2) * g * g`, v is
//    rounded twice, and the two coefficients, each rounded, do not add up to one: at beta2 = 0.999
//    the second moment drifts by 1.3e-8 of itself per step.
//  * the bias correction multiplies by a reciprocal inside an fma instead of dividing.
#pragma once

#include "../numerics/arithmetic.h"
#include "../numerics/power.h"
#include "traits.h"

namespace recap {

// Hyperparameters of one group as its param group holds them.
struct AdamHyper {
  double beta1, beta2, eps, weight_decay;
  bool amsgrad, decoupled_weight_decay;
  bool lazy;  // rows whose gradient is zero, or that have none, are left alone
};

// What one step needs of them: computed in double, used in the type of the update.
template <typename T>
struct AdamValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T decay;        // what a decoupled weight decay leaves of the parameter
  T average;      // lerp factor of exp_avg
  T square;       // weight of the new gradient's square in exp_avg_sq
  T square_kept;  // beta2, what exp_avg_sq keeps of itself where it does not lerp
  T inverse_root_correction2;
  T eps;
  T minus_step_size;
};

// Of an average that decays by `beta` and started at zero.
struct BiasCorrection {
  double value;
  double inverse_root;
};

RECAP_INLINE BiasCorrection bias_correction(double beta, double step) {
  const double value = 1.0 - power(beta, step);
  return {value, divide(1.0, square_root(value))};
}

// `correction(beta, step)` computes what `bias_correction` does.
template <typename Correction>
RECAP_INLINE AdamValues<double> adam_values(const AdamHyper& h, const StepInputs& inputs,
                                            double grad_factor, Correction&& correction) {
  return {
      grad_factor,
      h.decoupled_weight_decay ? 0.0 : h.weight_decay,
      h.decoupled_weight_decay ? 1.0 - inputs.lr * h.weight_decay : 1.0,
      lerp_factor(1.0 - h.beta1),
      1.0 - h.beta2,
      h.beta2,
      correction(h.beta2, inputs.step).inverse_root,
      h.eps,
      -divide(inputs.lr, correction(h.beta1, inputs.step).value),
  };
}

RECAP_INLINE AdamValues<float> to_float(const AdamValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor),
      static_cast<float>(h.l2),
      static_cast<float>(h.decay),
      static_cast<float>(h.average),
      static_cast<float>(h.square),
      static_cast<float>(h.square_kept),
      static_cast<float>(h.inverse_root_correction2),
      static_cast<float>(h.eps),
      static_cast<float>(h.minus_step_size),
  };
}

template <bool kL2, bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr unsigned kNeverNegative = 0b110;
  template <typename T>
  using Values = AdamValues<T>;

  template <typename S, typename T>
  static RECAP_INLINE void update(const AdamValues<S>& h, T grad, T& param, T* state) {
    T g = grad * h.grad_factor;
    if constexpr (kL2) g = fma(h.l2, param, g);

    T& m = state[0];
    m = fma(h.average, g - m, h.average > 0 ? m : g);

    // The lerp rounds once. It is not for a square that overflows before it is weighted, nor for a
    // v that has overflowed and stays infinite, as in torch, both of which show in the distance;
    // nor for a weight at which it would keep v's rounding. An infinite v that keeps a factor of
    // zero becomes NaN, as in torch.
    T& v = state[1];
    const T distance = fma(g, g, -v);
    const bool slow = h.square < S(0.5);
    const auto lerps = both(slow, magnitude(distance) < infinity<S>());
    v = select(lerps, fma(h.square, distance, v), fma(h.square * g, g, h.square_kept * v));

    T second = v;
    if constexpr (kAmsgrad) {
      T& largest = state[2];
      largest = select(either(v > largest, v != v), v, largest);
      second = largest;
    }
    const T denominator = fma(square_root(second), h.inverse_root_correction2, h.eps);
    param = fma(h.minus_step_size, divide(m, denominator), param * h.decay);
  }
};

struct AdamTraits {
  using Hyper = AdamHyper;
  template <typename T>
  using Values = AdamValues<T>;

  static constexpr Option kOptions[] = {
      {"betas", OptionKind::decay_rates, offsetof(AdamHyper, beta1)},
      {"eps", OptionKind::number, offsetof(AdamHyper, eps)},
      {"weight_decay", OptionKind::number, offsetof(AdamHyper, weight_decay)},
      {"amsgrad", OptionKind::flag, offsetof(AdamHyper, amsgrad)},
      {"decoupled_weight_decay", OptionKind::flag, offsetof(AdamHyper, decoupled_weight_decay)},
      {"lazy", OptionKind::flag, offsetof(AdamHyper, lazy), false},
  };
  static constexpr bool kCounts = true;
  static constexpr bool kTakesSparse = true;

  static StateNames states(const AdamHyper& h) {
    StateNames names("exp_avg", "exp_avg_sq");
    if (h.amsgrad) names.add("max_exp_avg_sq");
    return names;
  }
  static int shape(const AdamHyper& h) { return (h.amsgrad ? 1 : 0) | (h.lazy ? 2 : 0); }

  template <typename Update>
  static RECAP_INLINE Update update(const AdamHyper& h) {
    const bool l2 = h.weight_decay != 0.0 && !h.decoupled_weight_decay;
    if (h.amsgrad) return l2 ? Update::adam_amsgrad_l2 : Update::adam_amsgrad;
    return l2 ? Update::adam_l2 : Update::adam;
  }
  template <typename Correction>
  static RECAP_INLINE AdamValues<double> values(const AdamHyper& h, const StepInputs& inputs,
                                                double grad_factor, Correction&& correction) {
    return adam_values(h, inputs, grad_factor, correction);
  }
};

}  // namespace recap
