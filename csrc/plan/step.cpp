#include "step.h"

namespace recap {

Values make_values(const Hyper& hyper, double step, bool first, double grad_scale, double clip) {
  Values values;
  ValuesMaker().make(hyper, step, first, gradient_factor(grad_scale, clip), values);
  return values;
}

void ValuesMaker::make(const Hyper& hyper, double step, bool first, double factor, Values& out) {
  const auto remembered = [this](double beta, double step) { return correction(beta, step); };
  compute_values(hyper, {hyper.lr, step, first, factor}, remembered, out);
}

void add_eps_before_correction(Values& values) {
  values.float64.adam.eps *= values.float64.adam.inverse_root_correction2;
  values.float32.adam = to_float(values.float64.adam);
}

const BiasCorrection& ValuesMaker::correction(double beta, double step) {
  for (const Known& known : known_) {
    if (known.beta == beta && known.step == step) return known.correction;
  }
  Known& entry = known_[oldest_];
  oldest_ = (oldest_ + 1) % kRemembered;
  entry = {beta, step, bias_correction(beta, step)};
  return entry.correction;
}

}  // namespace recap
