// RMSprop: the update of one element.
//
// Tieleman & Hinton, lecture 6.5 of "Neural Networks for Machine Learning" (2012); centered:
// Graves, "Generating Sequences With Recurrent Neural Networks" (arXiv:1308.0850). Arguments and
// results are those of torch.optim.RMSprop. square_avg moves as Adam's second moment does, see
// adam.h.
#pragma once

#include "../numerics/arithmetic.h"
#include "traits.h"

namespace recap {

struct RmspropHyper {
  double alpha, eps, weight_decay, momentum;
  bool centered;
};

template <typename T>
struct RmspropValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T average;      // weight of the new gradient in grad_avg, and of its square in square_avg
  T momentum;
  T eps;
  T minus_lr;
};

RECAP_INLINE RmspropValues<double> rmsprop_values(const RmspropHyper& h, const StepInputs& inputs,
                                                  double grad_factor) {
  return {grad_factor, h.weight_decay, 1.0 - h.alpha, h.momentum, h.eps, -inputs.lr};
}

RECAP_INLINE RmspropValues<float> to_float(const RmspropValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor), static_cast<float>(h.l2),  static_cast<float>(h.average),
      static_cast<float>(h.momentum),    static_cast<float>(h.eps), static_cast<float>(h.minus_lr),
  };
}

template <bool kMomentum, bool kCentered>
struct Rmsprop {
  static constexpr int kStates = 1 + kMomentum + kCentered;
  static constexpr unsigned kNeverNegative = 0b1;
  template <typename T>
  using Values = RmspropValues<T>;

  template <typename S, typename T>
  static RECAP_INLINE void update(const RmspropValues<S>& h, T grad, T& param, T* state) {
    T g = grad * h.grad_factor;
    // A select, not a variant of each update: with no decay, an infinite parameter is no matter.
    const T decayed = fma(h.l2, param, g);
    g = h.l2 != 0 ? decayed : g;

    T& v = state[0];
    const T distance = fma(g, g, -v);
    const bool slow = h.average < S(0.5);
    const auto lerps = both(slow, magnitude(distance) < infinity<S>());
    v = select(lerps, fma(h.average, distance, v), fma(h.average * g, g, (1 - h.average) * v));

    T variance = v;
    if constexpr (kCentered) {
      T& m = state[1 + kMomentum];
      const T way = g - m;
      m = slow ? fma(h.average, way, m) : fma(h.average, way, -way) + g;
      // Rounding may take it below zero where gradients hardly change; torch's is NaN then.
      variance = fma(-m, m, v);
      variance = select(variance < S(0), T(S(0)), variance);
    }
    T direction = divide(g, square_root(variance) + h.eps);
    if constexpr (kMomentum) {
      T& buffer = state[1];
      buffer = fma(h.momentum, buffer, direction);
      direction = buffer;
    }
    param = fma(h.minus_lr, direction, param);
  }
};

struct RmspropTraits {
  using Hyper = RmspropHyper;
  template <typename T>
  using Values = RmspropValues<T>;

  static constexpr Option kOptions[] = {
      {"alpha", OptionKind::decay_rate, offsetof(RmspropHyper, alpha)},
      {"eps", OptionKind::number, offsetof(RmspropHyper, eps)},
      {"weight_decay", OptionKind::number, offsetof(RmspropHyper, weight_decay)},
      {"momentum", OptionKind::number, offsetof(RmspropHyper, momentum)},
      {"centered", OptionKind::flag, offsetof(RmspropHyper, centered)},
  };
  static constexpr bool kCounts = true;
  static constexpr bool kTakesSparse = false;

  static StateNames states(const RmspropHyper& h) {
    StateNames names("square_avg");
    if (h.momentum > 0.0) names.add("momentum_buffer");
    if (h.centered) names.add("grad_avg");
    return names;
  }
  static int shape(const RmspropHyper& h) {
    return (h.momentum > 0.0 ? 1 : 0) | (h.centered ? 2 : 0);
  }

  template <typename Update>
  static RECAP_INLINE Update update(const RmspropHyper& h) {
    if (h.momentum > 0.0) {
      return h.centered ? Update::rmsprop_centered_momentum : Update::rmsprop_momentum;
    }
    return h.centered ? Update::rmsprop_centered : Update::rmsprop;
  }
  template <typename Correction>
  static RECAP_INLINE RmspropValues<double> values(const RmspropHyper& h, const StepInputs& inputs,
                                                   double grad_factor, Correction&&) {
    return rmsprop_values(h, inputs, grad_factor);
  }
};

}  // namespace recap
