// Row-wise Adagrad: the update of one row of an embedding table, with one sum for all of its
// elements.
//
// Arguments and results are those of FBGEMM's EXACT_ROWWISE_ADAGRAD, with no weight decay, L2 or
// decoupled. Duchi, Hazan & Singer (JMLR 12, 2011); a sum per row from Mudigere et al.,
// "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
// Models" (ISCA 2022).
#pragma once

#include "../numerics/arithmetic.h"
#include "traits.h"

namespace recap {

struct RowwiseAdagradHyper {
  double eps, weight_decay;
  bool decoupled_weight_decay;
};

template <typename T>
struct RowwiseAdagradValues {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T l2;           // weight decay added to the gradient
  T decay;        // what a decoupled weight decay leaves of the parameter
  T eps;
  T minus_lr;
};

RECAP_INLINE RowwiseAdagradValues<double> rowwise_adagrad_values(const RowwiseAdagradHyper& h,
                                                                 const StepInputs& inputs,
                                                                 double grad_factor) {
  return {
      grad_factor,
      h.decoupled_weight_decay ? 0.0 : h.weight_decay,
      h.decoupled_weight_decay ? 1.0 - inputs.lr * h.weight_decay : 1.0,
      h.eps,
      -inputs.lr,
  };
}

RECAP_INLINE RowwiseAdagradValues<float> to_float(const RowwiseAdagradValues<double>& h) {
  return {
      static_cast<float>(h.grad_factor), static_cast<float>(h.l2),
      static_cast<float>(h.decay),       static_cast<float>(h.eps),
      static_cast<float>(h.minus_lr),
  };
}

// The steps of an update, in the order in which a row goes through them. It reads the row twice.
template <bool kL2>
struct RowwiseAdagrad {
  template <typename T>
  using Values = RowwiseAdagradValues<T>;

  // Squares are summed in so many lanes, element i in lane i % kLanes, so that the sum has the same
  // bits however wide a vector is.
  static constexpr int kLanes = 16;

  template <typename T>
  static RECAP_INLINE T gradient(const RowwiseAdagradValues<T>& h, T grad, T param) {
    const T g = grad * h.grad_factor;
    return kL2 ? fma(h.l2, param, g) : g;
  }

  // By halves, each of a length that the compiler knows: in one loop over all it would branch.
  template <typename T>
  static RECAP_INLINE T total(const T* lanes) {
    static_assert(kLanes == 16);
    T eight[8], four[4];
    for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
  }

  // Adds the mean of the squares to the row's sum; returns what the gradient is multiplied by.
  template <typename T>
  static RECAP_INLINE T take(const RowwiseAdagradValues<T>& h, T total, T size, T& sum) {
    sum += divide(total, size);
    return divide(h.minus_lr, square_root(sum) + h.eps);
  }

  template <typename T>
  static RECAP_INLINE T update(const RowwiseAdagradValues<T>& h, T multiplier, T grad, T param) {
    return fma(multiplier, gradient(h, grad, param), param * h.decay);
  }
};

struct RowwiseAdagradTraits {
  using Hyper = RowwiseAdagradHyper;
  template <typename T>
  using Values = RowwiseAdagradValues<T>;

  static constexpr Option kOptions[] = {
      {"eps", OptionKind::number, offsetof(RowwiseAdagradHyper, eps)},
      {"weight_decay", OptionKind::number, offsetof(RowwiseAdagradHyper, weight_decay)},
      {"decoupled_weight_decay", OptionKind::flag,
       offsetof(RowwiseAdagradHyper, decoupled_weight_decay)},
  };
  static constexpr bool kCounts = true;
  static constexpr bool kTakesSparse = true;

  static StateNames states(const RowwiseAdagradHyper&) { return StateNames("sum"); }
  static int shape(const RowwiseAdagradHyper&) { return 0; }

  template <typename Update>
  static RECAP_INLINE Update update(const RowwiseAdagradHyper& h) {
    const bool l2 = h.weight_decay != 0.0 && !h.decoupled_weight_decay;
    return l2 ? Update::rowwise_adagrad_l2 : Update::rowwise_adagrad;
  }
  template <typename Correction>
  static RECAP_INLINE RowwiseAdagradValues<double> values(const RowwiseAdagradHyper& h,
                                                          const StepInputs& inputs,
                                                          double grad_factor, Correction&&) {
    return rowwise_adagrad_values(h, inputs, grad_factor);
  }
};

}  // namespace recap
