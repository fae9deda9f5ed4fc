// Lion against Algorithm 2 of Chen et al. (arXiv:2302.06675), in long double.
#include "algorithms/lion.h"

#include "bounded.h"
#include "check.h"

namespace {

using namespace bounded;
using LionHyper = WithLr<recap::LionHyper>;
using recap::LionValues;

template <typename T>
LionValues<T> values_in(const LionHyper& hyper, double grad_factor) {
  return in_type<T>(recap::lion_values(hyper, {hyper.lr, 7.0, false, 1.0}, grad_factor));
}

LionHyper random_hyper(Random& random) {
  LionHyper h;
  h.lr = log_uniform(random, 1e-6, 1e-1);
  h.beta1 = choose(random, {0.9, 0.3, 0.0, uniform(random, 0, 1)});
  h.beta2 = choose(random, {0.99, 0.2, 0.0, uniform(random, 0, 1)});
  h.weight_decay = choose(random, {0.0, log_uniform(random, 1e-4, 1)});
  return h;
}

// A weighted mean by a lerp rounds a difference, the weight and the result.
template <typename T>
Bounded mean(T old, Bounded grad, double kept) {
  const long double value = kept * old + (1 - static_cast<long double>(kept)) * grad.value;
  const long double size = std::fabs(static_cast<long double>(old)) + std::fabs(grad.value);
  return rounded<T>({value, grad.error + 4 * kRoundoff<T> * size});
}

template <typename T>
void check_steps() {
  Random random(1);
  Comparison comparison;
  int moved = 0;
  for (int run = 0; run < 50000; ++run) {
    const LionHyper h = random_hyper(random);
    const T factor = choose(random, {T(1), T(-1), T(1) / 1024, static_cast<T>(normal(random))});
    const T before = static_cast<T>(normal(random)), old = static_cast<T>(normal(random));
    const T grad = random() % 8 ? static_cast<T>(normal(random)) : T(0);
    T param = before, average = old;
    recap::Lion::update(values_in<T>(h, factor), grad, param, &average);

    const Bounded g = scaled<T>(grad, factor);
    const Bounded blended = mean<T>(old, g, h.beta1);
    CHECK(comparison.holds(average, mean<T>(old, g, h.beta2)), "run ", run);
    if (std::fabs(blended.value) <= blended.error) continue;  // of either sign
    ++moved;
    const Bounded decay = coefficient<T>(
        rounded<double>(Bounded{1} - rounded<double>(Bounded{h.lr} * Bounded{h.weight_decay})));
    const Bounded move = coefficient<T>({blended.value > 0 ? -h.lr : h.lr});
    CHECK(comparison.holds(param, rounded<T>(rounded<T>(Bounded{before} * decay) + move)), "run ",
          run);
  }
  CHECK(moved > 40000, "of too few elements the sign was known");
  CHECK(comparison.largest_share() > 0.3L, "no error came near its bound");
}

TEST(float_steps_stay_within_their_rounding_errors) { check_steps<float>(); }
TEST(double_steps_stay_within_their_rounding_errors) { check_steps<double>(); }

TEST(an_element_without_momentum_or_gradient_only_decays) {
  const LionHyper h{{0.9, 0.99, 0.5}, 0.25};
  float param = 2, average = 0;
  recap::Lion::update(values_in<float>(h, 1), 0.0f, param, &average);
  CHECK_EQ(param, 2 * (1 - 0.25f * 0.5f));
  CHECK_EQ(average, 0.0f);
}

TEST(what_is_not_a_number_shows) {
  const LionHyper h{{0.9, 0.99, 0.0}, 0.25};
  float param = 2, average = 0;
  recap::Lion::update(values_in<float>(h, 1), std::nanf(""), param, &average);
  CHECK(std::isnan(param) && std::isnan(average));
  param = 2, average = 0;
  recap::Lion::update(values_in<float>(h, 1), INFINITY, param, &average);
  CHECK_EQ(param, 2 - 0.25f);
}

}  // namespace
