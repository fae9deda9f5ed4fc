#include "step.h"

namespace recap {

Values make_values(const Hyper& hyper, double step, bool first, double grad_scale, double clip) {
  return ValuesMaker().make(hyper, step, first, grad_scale, clip);
}

Values ValuesMaker::make(const Hyper& hyper, double step, bool first, double grad_scale,
                         double clip) {
  Values values;
  const auto remembered = [this](double base, double exponent) { return power(base, exponent); };
  compute_values(hyper, {hyper.lr, step, first, grad_scale, clip}, remembered, values);
  return values;
}

void add_eps_before_correction(Values& values) {
  values.float64.adam.eps *= values.float64.adam.inverse_root_correction2;
  values.float32.adam = to_float(values.float64.adam);
}

double ValuesMaker::power(double base, double exponent) {
  for (const Power& known : powers_) {
    if (known.base == base && known.exponent == exponent) return known.value;
  }
  Power& entry = powers_[oldest_];
  oldest_ = (oldest_ + 1) % kRemembered;
  entry = {base, exponent, recap::power(base, exponent)};
  return entry.value;
}

}  // namespace recap
