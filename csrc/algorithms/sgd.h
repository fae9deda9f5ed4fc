// Stochastic gradient descent with momentum: the update of one element.
//
// Arguments and results are those of torch.optim.SGD for dense gradients; Nesterov momentum in the
// form of Sutskever et al. (ICML 2013).
#pragma once

#include "../numerics/arithmetic.h"
#include "traits.h"

namespace recap {

struct SgdHyper {
  double momentum, dampening, weight_decay;
  bool nesterov;
};

template <typename T>
struct SgdValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T momentum;     // of the Nesterov look-ahead
  T buffer_decay, buffer_gain;
  T minus_lr;
};

// `inputs.first`: the momentum buffer is new and all zero, and starts as the gradient itself.
RECAP_INLINE SgdValues<double> sgd_values(const SgdHyper& h, const StepInputs& inputs,
                                          double grad_factor) {
  return {
      grad_factor,
      h.weight_decay,
      h.momentum,
      inputs.first ? 0.0 : h.momentum,
      inputs.first ? 1.0 : 1.0 - h.dampening,
      -inputs.lr,
  };
}

RECAP_INLINE SgdValues<float> to_float(const SgdValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor), static_cast<float>(h.l2),
      static_cast<float>(h.momentum),    static_cast<float>(h.buffer_decay),
      static_cast<float>(h.buffer_gain), static_cast<float>(h.minus_lr),
  };
}

template <bool kL2, bool kMomentum, bool kNesterov>
struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr unsigned kNeverNegative = 0;
  template <typename T>
  using Values = SgdValues<T>;

  template <typename S, typename T>
  static RECAP_INLINE void update(const SgdValues<S>& h, T grad, T& param, T* state) {
    T g = grad * h.grad_factor;
    if constexpr (kL2) g = fma(h.l2, param, g);
    if constexpr (kMomentum) {
      T& buffer = state[0];
      buffer = fma(h.buffer_gain, g, h.buffer_decay * buffer);
      g = kNesterov ? fma(h.momentum, buffer, g) : buffer;
    }
    param = fma(h.minus_lr, g, param);
  }
};

struct SgdTraits {
  using Hyper = SgdHyper;
  template <typename T>
  using Values = SgdValues<T>;

  static constexpr Option kOptions[] = {
      {"momentum", OptionKind::number, offsetof(SgdHyper, momentum)},
      {"dampening", OptionKind::number, offsetof(SgdHyper, dampening)},
      {"weight_decay", OptionKind::number, offsetof(SgdHyper, weight_decay)},
      {"nesterov", OptionKind::flag, offsetof(SgdHyper, nesterov)},
  };
  static constexpr bool kCounts = false;
  static constexpr bool kTakesSparse = true;

  static StateNames states(const SgdHyper& h) {
    return h.momentum != 0.0 ? StateNames("momentum_buffer") : StateNames();
  }
  static int shape(const SgdHyper& h) { return h.momentum != 0.0; }

  template <typename Update>
  static RECAP_INLINE Update update(const SgdHyper& h) {
    const bool l2 = h.weight_decay != 0.0;
    if (h.momentum == 0.0) return l2 ? Update::sgd_l2 : Update::sgd;
    if (h.nesterov) return l2 ? Update::sgd_nesterov_l2 : Update::sgd_nesterov;
    return l2 ? Update::sgd_momentum_l2 : Update::sgd_momentum;
  }
  template <typename Correction>
  static RECAP_INLINE SgdValues<double> values(const SgdHyper& h, const StepInputs& inputs,
                                               double grad_factor, Correction&&) {
    return sgd_values(h, inputs, grad_factor);
  }
};

}  // namespace recap
