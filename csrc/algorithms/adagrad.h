// Adagrad: the update of one element.
//
// Duchi, Hazan & Singer, "Adaptive Subgradient Methods" (JMLR 12, 2011). Arguments and results are
// those of torch.optim.Adagrad for dense gradients.
#pragma once

#include "../numerics/arithmetic.h"

namespace recap {

struct AdagradHyper {
  double lr, lr_decay, eps, weight_decay;
};

template <typename T>
struct AdagradValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T eps;
  T minus_step_size;
};

RECAP_INLINE AdagradValues<double> adagrad_values(const AdagradHyper& h, double step,
                                                  double grad_factor) {
  return {grad_factor, h.weight_decay, h.eps, -divide(h.lr, 1.0 + (step - 1.0) * h.lr_decay)};
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
  template <typename T>
  using Values = AdagradValues<T>;

  template <typename T>
  static RECAP_INLINE void update(const AdagradValues<T>& h, T grad, T& param, T* state) {
    T g = grad * h.grad_factor;
    if constexpr (kL2) g = fma(h.l2, param, g);
    T& sum = state[0];
    sum = fma(g, g, sum);
    param = fma(h.minus_step_size, divide(g, square_root(sum) + h.eps), param);
  }
};

}  // namespace recap
