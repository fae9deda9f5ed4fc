// Adagrad against the formulas of torch.optim.Adagrad, in long double.
#include "algorithms/adagrad.h"

#include "bounded.h"
#include "check.h"

namespace {

using namespace bounded;
using AdagradHyper = WithLr<recap::AdagradHyper>;
using recap::AdagradValues;

template <typename T>
AdagradValues<T> values_in(const AdagradHyper& hyper, double step, double grad_factor) {
  return in_type<T>(recap::adagrad_values(hyper, {hyper.lr, step, false, 1.0}, grad_factor));
}

template <typename T>
void update(bool l2, const AdagradValues<T>& values, T grad, T& param, T& sum) {
  if (l2) {
    recap::Adagrad<true>::update(values, grad, param, &sum);
  } else {
    recap::Adagrad<false>::update(values, grad, param, &sum);
  }
}

template <typename T>
Bounded minus_step_size(const AdagradHyper& h, double step) {
  const Bounded slowed =
      rounded<double>(Bounded{1} + rounded<double>(Bounded{step - 1} * Bounded{h.lr_decay}));
  return coefficient<T>(rounded<double>(Bounded{-h.lr} / slowed));
}

template <typename T>
struct Reference {
  Bounded param, sum;

  void step(const AdagradHyper& h, double step, T grad_factor, T grad) {
    Bounded g = scaled<T>(grad, grad_factor);
    if (h.weight_decay != 0) g = rounded<T>(g + coefficient<T>({h.weight_decay}) * param);
    sum = rounded<T>(sum + g * g);
    const Bounded denominator = rounded<T>(rounded<T>(square_root(sum)) + coefficient<T>({h.eps}));
    const Bounded direction = rounded<T>(g / denominator);
    param = rounded<T>(param + minus_step_size<T>(h, step) * direction);
  }
};

AdagradHyper random_hyper(Random& random) {
  AdagradHyper h;
  h.lr = log_uniform(random, 1e-5, 1);
  h.lr_decay = choose(random, {0.0, log_uniform(random, 1e-4, 1)});
  h.eps = log_uniform(random, 1e-12, 1e-2);
  h.weight_decay = choose(random, {0.0, log_uniform(random, 1e-4, 0.3)});
  return h;
}

template <typename T>
void check_trajectories() {
  Random random(1);
  Comparison comparison;
  for (int run = 0; run < 2000; ++run) {
    const AdagradHyper h = random_hyper(random);
    const T grad_factor =
        choose(random, {T(1), T(-1), T(1) / 1024, static_cast<T>(normal(random))});
    const double first_step = choose(random, {1.0, 2.0, 1000.0, 1e7});
    const double scale = log_uniform(random, 1e-4, 1e3);
    T param = static_cast<T>(normal(random));
    T sum = choose(random, {T(0), T(0.1)});
    Reference<T> reference{{param}, {sum}};
    for (int i = 0; i < 40; ++i) {
      const T grad = random() % 8 ? static_cast<T>(scale * normal(random)) : T(0);
      update<T>(h.weight_decay != 0, values_in<T>(h, first_step + i, grad_factor), grad, param,
                sum);
      reference.step(h, first_step + i, grad_factor, grad);
      CHECK(comparison.holds(param, reference.param), "run ", run, " step ", i, ": param ", param,
            ", expected ", reference.param.value, " within ", reference.param.error);
      CHECK(comparison.holds(sum, reference.sum), "run ", run, " step ", i);
    }
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

TEST(float_trajectories_stay_within_their_rounding_errors) { check_trajectories<float>(); }
TEST(double_trajectories_stay_within_their_rounding_errors) { check_trajectories<double>(); }

template <typename T>
void check_values() {
  Random random(2);
  Comparison comparison;
  for (int run = 0; run < 20000; ++run) {
    const AdagradHyper h = random_hyper(random);
    const double step = std::floor(log_uniform(random, 1, 1e7));
    const AdagradValues<T> found = values_in<T>(h, step, -0.25);
    CHECK_EQ(found.grad_factor, T(-0.25));
    CHECK_EQ(found.eps, static_cast<T>(h.eps));
    CHECK_EQ(found.l2, static_cast<T>(h.weight_decay));
    CHECK(comparison.holds(found.minus_step_size, minus_step_size<T>(h, step)), "run ", run);
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

TEST(values_in_double_are_those_of_the_formulas) { check_values<double>(); }
TEST(values_in_float_are_those_of_the_formulas) { check_values<float>(); }

constexpr AdagradHyper kUsual{{0.0, 1e-10, 0.0}, 0.01};

TEST(a_zero_gradient_changes_nothing) {
  Random random(3);
  for (int run = 0; run < 10000; ++run) {
    const float before = static_cast<float>(normal(random));
    const float sum_before = choose(random, {0.0f, static_cast<float>(std::fabs(normal(random)))});
    float param = before, sum = sum_before;
    update<float>(false, values_in<float>(kUsual, 1 + run, 1), 0.0f, param, sum);
    CHECK_EQ(param, before);
    CHECK_EQ(sum, sum_before);
  }
}

// The root of a rounded square is the number itself, so nothing is lost before the last rounding.
TEST(the_first_step_without_eps_is_the_learning_rate) {
  Random random(4);
  for (int run = 0; run < 10000; ++run) {
    AdagradHyper h = kUsual;
    h.lr = log_uniform(random, 1e-5, 1);
    h.eps = 0;
    const float before = static_cast<float>(normal(random));
    const float sign = random() % 2 ? 1.0f : -1.0f;
    float param = before, sum = 0;
    const float grad = sign * static_cast<float>(log_uniform(random, 1e-6, 1e6));
    update<float>(false, values_in<float>(h, 1, 1), grad, param, sum);
    CHECK_EQ(param, before - sign * static_cast<float>(h.lr));
    CHECK_EQ(sum, grad * grad);
  }
}

TEST(the_sum_never_falls) {
  Random random(5);
  float param = 0, sum = 0;
  for (int step = 1; step <= 10000; ++step) {
    const float before = sum;
    const float grad = static_cast<float>(log_uniform(random, 1e-6, 1) * normal(random));
    update<float>(false, values_in<float>(kUsual, step, 1), grad, param, sum);
    CHECK(sum >= before, "step ", step);
  }
}

TEST(learning_rate_decay_leaves_the_first_step_alone) {
  AdagradHyper h = kUsual;
  h.lr_decay = 0.5;
  CHECK_EQ(recap::adagrad_values(h, {h.lr, 1, false, 1}, 1).minus_step_size, -0.01);
  CHECK_EQ(recap::adagrad_values(h, {h.lr, 3, false, 1}, 1).minus_step_size, -0.005);
}

TEST(maximizing_mirrors_minimizing) {
  Random random(6);
  float down = 1, up = 1, down_sum = 0, up_sum = 0;
  for (int step = 1; step <= 1000; ++step) {
    AdagradHyper h = kUsual;
    h.weight_decay = 0.1;
    const float grad = static_cast<float>(normal(random));
    update<float>(true, values_in<float>(h, step, 1), grad, down, down_sum);
    update<float>(true, values_in<float>(h, step, -1), -grad, up, up_sum);
    CHECK_EQ(up, down);
    CHECK_EQ(up_sum, down_sum);
  }
}

TEST(an_overflowed_sum_stays_infinite_and_stops_the_parameter) {
  float param = 1, sum = 0;
  for (const float grad : {1e30f, 1.0f, 0.0f, -1e30f}) {
    update<float>(false, values_in<float>(kUsual, 1, 1), grad, param, sum);
    CHECK_EQ(sum, std::numeric_limits<float>::infinity());
    CHECK_EQ(param, 1.0f);
  }
}

TEST(a_nan_gradient_shows) {
  float param = 1, sum = 1;
  update<float>(false, values_in<float>(kUsual, 1, 1), std::numeric_limits<float>::quiet_NaN(),
                param, sum);
  CHECK(std::isnan(param) && std::isnan(sum));
}

}  // namespace
