#include "step.h"

namespace recap {
namespace {

Update with_l2(Update plain, double weight_decay) {
  return static_cast<Update>(static_cast<int>(plain) + (weight_decay != 0.0 ? 1 : 0));
}

}  // namespace

Values make_values(const Hyper& hyper, double step, bool first, double grad_scale) {
  // As torch.amp.GradScaler does: the reciprocal, rounded to float.
  const double inverse_scale = static_cast<float>(1.0 / grad_scale);
  const double grad_factor = hyper.maximize ? -inverse_scale : inverse_scale;
  Values values;
  switch (hyper.algorithm) {
    case Algorithm::adam: {
      const AdamHyper& h = hyper.adam;
      values.update = with_l2(h.amsgrad ? Update::adam_amsgrad : Update::adam,
                              h.decoupled_weight_decay ? 0.0 : h.weight_decay);
      values.float64.adam = adam_values(h, step, grad_factor);
      values.float32.adam = to_float(values.float64.adam);
      break;
    }
    case Algorithm::adagrad: {
      const AdagradHyper& h = hyper.adagrad;
      values.update = with_l2(Update::adagrad, h.weight_decay);
      values.float64.adagrad = adagrad_values(h, step, grad_factor);
      values.float32.adagrad = to_float(values.float64.adagrad);
      break;
    }
    case Algorithm::sgd: {
      const SgdHyper& h = hyper.sgd;
      const Update plain = h.momentum == 0.0 ? Update::sgd
                           : h.nesterov      ? Update::sgd_nesterov
                                             : Update::sgd_momentum;
      values.update = with_l2(plain, h.weight_decay);
      values.float64.sgd = sgd_values(h, first, grad_factor);
      values.float32.sgd = to_float(values.float64.sgd);
      break;
    }
  }
  return values;
}

}  // namespace recap
