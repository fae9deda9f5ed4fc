// The values that one step uses of a group's hyperparameters, computed by the same code on host and
// device, to the same bits.
#pragma once

#include <cstdint>

#include "../algorithms/updates.h"

namespace recap {

enum class Algorithm : uint8_t { adam, adagrad, sgd, rowwise_adagrad };

// The hyperparameters of one group.
struct Hyper {
  Algorithm algorithm = Algorithm::adam;
  bool maximize = false;
  bool sparse_only = false;  // refuses dense gradients, as torch.optim.SparseAdam does
  union {
    AdamHyper adam;
    AdagradHyper adagrad;
    SgdHyper sgd;
    RowwiseAdagradHyper rowwise_adagrad;
  };
  Hyper() : adam{} {}

  RECAP_INLINE double lr() const { return adam.lr; }  // all begin with it

  // Whether whole rows are updated, or left alone if their gradient is zero.
  RECAP_INLINE bool by_rows() const {
    return algorithm == Algorithm::rowwise_adagrad || (algorithm == Algorithm::adam && adam.lazy);
  }
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

// Where a slot stands at a step, and what stands in the place of its group's learning rate.
struct StepInputs {
  double lr;
  double step;        // counts from 1
  bool first;         // an SGD momentum buffer is new
  double grad_scale;  // gradients are divided by it
  double clip = 1.0;  // and multiplied by this
};

// The options of an update come in pairs: without and with weight decay added to the gradient.
RECAP_INLINE Update with_l2(Update plain, double weight_decay) {
  return static_cast<Update>(static_cast<int>(plain) + (weight_decay != 0.0 ? 1 : 0));
}

// Writes to `out`: returned, a union would take a detour through the memory of a device thread.
// `power(base, exponent)` computes what recap::power does.
template <typename Power>
RECAP_INLINE void compute_values(const Hyper& hyper, const StepInputs& inputs, Power&& power,
                                 Values& out) {
  // As torch.amp.GradScaler does: the reciprocal, rounded to float.
  const double inverse_scale = static_cast<float>(divide(1.0, inputs.grad_scale));
  const double factor = inverse_scale * inputs.clip;
  const double grad_factor = hyper.maximize ? -factor : factor;
  switch (hyper.algorithm) {
    case Algorithm::adam: {
      AdamHyper h = hyper.adam;
      h.lr = inputs.lr;
      out.update = with_l2(h.amsgrad ? Update::adam_amsgrad : Update::adam,
                           h.decoupled_weight_decay ? 0.0 : h.weight_decay);
      const AdamValues<double> values = adam_values(h, inputs.step, grad_factor, power);
      out.float64.adam = values;
      out.float32.adam = to_float(values);
      break;
    }
    case Algorithm::adagrad: {
      AdagradHyper h = hyper.adagrad;
      h.lr = inputs.lr;
      out.update = with_l2(Update::adagrad, h.weight_decay);
      const AdagradValues<double> values = adagrad_values(h, inputs.step, grad_factor);
      out.float64.adagrad = values;
      out.float32.adagrad = to_float(values);
      break;
    }
    case Algorithm::sgd: {
      SgdHyper h = hyper.sgd;
      h.lr = inputs.lr;
      const Update plain = h.momentum == 0.0 ? Update::sgd
                           : h.nesterov      ? Update::sgd_nesterov
                                             : Update::sgd_momentum;
      out.update = with_l2(plain, h.weight_decay);
      const SgdValues<double> values = sgd_values(h, inputs.first, grad_factor);
      out.float64.sgd = values;
      out.float32.sgd = to_float(values);
      break;
    }
    case Algorithm::rowwise_adagrad: {
      RowwiseAdagradHyper h = hyper.rowwise_adagrad;
      h.lr = inputs.lr;
      out.update =
          with_l2(Update::rowwise_adagrad, h.decoupled_weight_decay ? 0.0 : h.weight_decay);
      const RowwiseAdagradValues<double> values = rowwise_adagrad_values(h, grad_factor);
      out.float64.rowwise_adagrad = values;
      out.float32.rowwise_adagrad = to_float(values);
      break;
    }
  }
}

}  // namespace recap
