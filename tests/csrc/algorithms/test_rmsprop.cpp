// RMSprop against the formulas of torch.optim.RMSprop, in long double.
#include "algorithms/rmsprop.h"

#include "bounded.h"
#include "check.h"

namespace {

using namespace bounded;
using RmspropHyper = WithLr<recap::RmspropHyper>;
using recap::RmspropValues;

template <typename T>
RmspropValues<T> values_in(const RmspropHyper& hyper, double grad_factor) {
  return in_type<T>(recap::rmsprop_values(hyper, {hyper.lr, 7.0, false, 1.0}, grad_factor));
}

template <typename T>
void update(const RmspropHyper& h, const RmspropValues<T>& values, T grad, T& param, T* state) {
  const bool momentum = h.momentum != 0;
  if (momentum && h.centered) recap::Rmsprop<true, true>::update(values, grad, param, state);
  if (momentum && !h.centered) recap::Rmsprop<true, false>::update(values, grad, param, state);
  if (!momentum && h.centered) recap::Rmsprop<false, true>::update(values, grad, param, state);
  if (!momentum && !h.centered) recap::Rmsprop<false, false>::update(values, grad, param, state);
}

RmspropHyper random_hyper(Random& random) {
  RmspropHyper h;
  h.lr = log_uniform(random, 1e-5, 1);
  h.alpha = choose(random, {0.99, 0.9, 0.3, uniform(random, 0, 1)});
  h.eps = log_uniform(random, 1e-10, 1e-2);
  h.weight_decay = choose(random, {0.0, log_uniform(random, 1e-4, 0.3)});
  h.momentum = choose(random, {0.0, 0.9});
  h.centered = random() % 2;
  return h;
}

// An average by a lerp, or by a sum of two products: the terms are rounded, and the result.
template <typename T>
Bounded average(Bounded old, Bounded now, double kept) {
  const long double weight = 1 - static_cast<long double>(kept);
  const long double size = std::fabs(old.value) + std::fabs(now.value);
  return rounded<T>({kept * old.value + weight * now.value,
                     kept * old.error + weight * now.error + 4 * kRoundoff<T> * size});
}

template <typename T>
void check_trajectories() {
  Random random(1);
  Comparison comparison;
  for (int run = 0; run < 2000; ++run) {
    const RmspropHyper h = random_hyper(random);
    const T factor = choose(random, {T(1), T(-1), T(1) / 1024, static_cast<T>(normal(random))});
    T param = static_cast<T>(normal(random)), state[3] = {};
    Bounded expected{param}, square{0}, mean{0}, buffer{0};
    for (int i = 0; i < 20; ++i) {
      const T grad = static_cast<T>(normal(random));
      update<T>(h, values_in<T>(h, factor), grad, param, state);

      Bounded g = scaled<T>(grad, factor);
      if (h.weight_decay != 0) g = rounded<T>(g + coefficient<T>({h.weight_decay}) * expected);
      square = average<T>(square, g * g, h.alpha);
      Bounded variance = square;
      if (h.centered) {
        mean = average<T>(mean, g, h.alpha);
        variance = rounded<T>(square - mean * mean);
        CHECK(comparison.holds(state[h.momentum != 0 ? 2 : 1], mean), "run ", run, " step ", i);
        if (variance.value <= 2 * variance.error) break;  // cancelled: nothing more can be said
      }
      const Bounded root = rounded<T>(rounded<T>(square_root(variance)) + coefficient<T>({h.eps}));
      Bounded direction = rounded<T>(g / root);
      if (h.momentum != 0) {
        buffer = rounded<T>(coefficient<T>({h.momentum}) * buffer + direction);
        direction = buffer;
        CHECK(comparison.holds(state[1], buffer), "run ", run, " step ", i);
      }
      expected = rounded<T>(expected + coefficient<T>({-h.lr}) * direction);
      CHECK(comparison.holds(state[0], square), "run ", run, " step ", i);
      CHECK(comparison.holds(param, expected), "run ", run, " step ", i, ": param ", param,
            ", expected ", expected.value, " within ", expected.error);
    }
  }
  CHECK(comparison.largest_share() > 0.3L, "no error came near its bound");
}

TEST(float_trajectories_stay_within_their_rounding_errors) { check_trajectories<float>(); }
TEST(double_trajectories_stay_within_their_rounding_errors) { check_trajectories<double>(); }

TEST(without_a_weight_decay_an_infinite_parameter_is_no_matter) {
  const RmspropHyper h{{0.5, 1e-8, 0.0, 0.0, false}, 0.25};
  float param = INFINITY, square = 0;
  update<float>(h, values_in<float>(h, 1), 1.0f, param, &square);
  CHECK_EQ(square, 0.5f);
  CHECK_EQ(param, INFINITY);
}

// In float, the variance of gradients that hardly change is a difference of equal numbers.
TEST(a_variance_is_never_less_than_zero) {
  Random random(2);
  const RmspropHyper h{{0.5, 1e-3, 0.0, 0.0, true}, 0.0};
  for (int run = 0; run < 1000; ++run) {
    const float grad = static_cast<float>(normal(random));
    float param = 1, state[2] = {};
    for (int i = 0; i < 100; ++i) update<float>(h, values_in<float>(h, 1), grad, param, state);
    CHECK_EQ(param, 1.0f);  // not NaN
  }
}

TEST(what_is_not_a_number_shows) {
  const RmspropHyper h{{0.5, 1e-8, 0.0, 0.5, true}, 0.25};
  float param = 2, state[3] = {};
  update<float>(h, values_in<float>(h, 1), std::nanf(""), param, state);
  CHECK(std::isnan(param));
  for (const float value : state) CHECK(std::isnan(value));
}

}  // namespace
