// Adagrad: the update of one element.
//
// Duchi, Hazan & Singer, "Adaptive Subgradient Methods" (JMLR 12, 2011). Arguments and results are
// those of torch.optim.Adagrad for dense gradients.
#pragma once

#include "../numerics/arithmetic.h"
#include "traits.h"

namespace recap {

struct AdagradHyper {
  double lr_decay, eps, weight_decay;
};

template <typename T>
struct AdagradValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T eps;
  T minus_step_size;
};

RECAP_INLINE AdagradValues<double> adagrad_values(const AdagradHyper& h, const StepInputs& inputs,
                                                  double grad_factor) {
  const double minus_step_size = -divide(inputs.lr, 1.0 + (inputs.step - 1.0) * h.lr_decay);
  return {grad_factor, h.weight_decay, h.eps, minus_step_size};
}

RECAP_INLINE AdagradValues<float> to_float(const AdagradValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor),
      static_cast<float>(h.l2),
      static_cast<float>(h.eps),
      static_cast<float>(h.minus_step_size),
  };
}

template <bool kL2>
struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr unsigned kNeverNegative = 0b1;
  template <typename T>
  using Values = AdagradValues<T>;

  template <typename S, typename T>
  static RECAP_INLINE void update(const AdagradValues<S>& h, T grad, T& param, T* state) {
    T g = grad * h.grad_factor;
    if constexpr (kL2) g = fma(h.l2, param, g);
    T& sum = state[0];
    sum = fma(g, g, sum);
    param = fma(h.minus_step_size, divide(g, square_root(sum) + h.eps), param);
  }
};

struct AdagradTraits {
  using Hyper = AdagradHyper;
  template <typename T>
  using Values = AdagradValues<T>;

  static constexpr Option kOptions[] = {
      {"lr_decay", OptionKind::number, offsetof(AdagradHyper, lr_decay)},
      {"eps", OptionKind::number, offsetof(AdagradHyper, eps)},
      {"weight_decay", OptionKind::number, offsetof(AdagradHyper, weight_decay)},
  };
  static constexpr bool kCounts = true;
  static constexpr bool kTakesSparse = true;

  static StateNames states(const AdagradHyper&) { return StateNames("sum"); }
  static int shape(const AdagradHyper&) { return 0; }

  template <typename Update>
  static RECAP_INLINE Update update(const AdagradHyper& h) {
    return h.weight_decay != 0.0 ? Update::adagrad_l2 : Update::adagrad;
  }
  template <typename Correction>
  static RECAP_INLINE AdagradValues<double> values(const AdagradHyper& h, const StepInputs& inputs,
                                                   double grad_factor, Correction&&) {
    return adagrad_values(h, inputs, grad_factor);
  }
};

}  // namespace recap
