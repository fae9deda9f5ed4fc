// Adam against the formulas of torch.optim.Adam and AdamW, in long double.
#include "algorithms/adam.h"

#include <limits>

#include "bounded.h"
#include "check.h"

namespace {

using namespace bounded;
using AdamHyper = WithLr<recap::AdamHyper>;
using recap::AdamValues;

template <typename T>
AdamValues<T> values_in(const AdamHyper& hyper, double step, double grad_factor) {
  return in_type<T>(
      recap::adam_values(hyper, {hyper.lr, step, false, 1.0}, grad_factor, recap::bias_correction));
}

template <typename T>
void update(bool l2, bool amsgrad, const AdamValues<T>& values, T grad, T& param, T* state) {
  if (l2 && amsgrad) recap::Adam<true, true>::update(values, grad, param, state);
  if (l2 && !amsgrad) recap::Adam<true, false>::update(values, grad, param, state);
  if (!l2 && amsgrad) recap::Adam<false, true>::update(values, grad, param, state);
  if (!l2 && !amsgrad) recap::Adam<false, false>::update(values, grad, param, state);
}

// The values of a step as their formulas say, rounded where double arithmetic and T round.
template <typename T>
struct ExactValues {
  Bounded decay, average, square, inverse_root_correction2, minus_step_size;

  ExactValues(const AdamHyper& h, double step) {
    const Bounded decayed =
        rounded<double>(Bounded{1} - rounded<double>(Bounded{h.lr} * Bounded{h.weight_decay}));
    const Bounded root = rounded<double>(square_root(correction(h.beta2, step)));
    decay = h.decoupled_weight_decay ? coefficient<T>(decayed) : Bounded{1};
    average = lerp_factor(h.beta1);
    square = lerp_factor(h.beta2);
    inverse_root_correction2 = coefficient<T>(rounded<double>(Bounded{1} / root));
    minus_step_size = coefficient<T>(rounded<double>(Bounded{-h.lr} / correction(h.beta1, step)));
  }

  // 1 - beta^step, whose power is off by less than one unit in the last place.
  static Bounded correction(double beta, double step) {
    const long double power = std::pow(static_cast<long double>(beta), step);
    return rounded<double>(Bounded{1} - Bounded{power, 2 * kRoundoff<double> * power});
  }

  // 1 - beta below one half, else -beta: relative to that, either is rounded to T once.
  static Bounded lerp_factor(double beta) {
    if (beta > 0.5) return coefficient<T>(Bounded{1} - Bounded{beta});  // exact in double
    return coefficient<T>({-beta, beta > 0 ? kRoundoff<double> : 0});   // by way of 1 - beta
  }
};

// from + weight * (to - from), started from the nearer end: the difference, weighted, and the
// result are rounded. An error of the weight counts for the difference only, since what it takes
// from one end it gives to the other.
template <typename T>
Bounded lerp(Bounded from, Bounded to, Bounded factor) {
  const Bounded difference = rounded<T>(to - from);
  const long double difference_rounding = difference.error - from.error - to.error;
  const long double weight = factor.value > 0 ? factor.value : 1 + factor.value;
  Bounded result{(1 - weight) * from.value + weight * to.value};
  result.error = (1 - weight) * from.error + weight * to.error +
                 std::fabs(factor.value) * difference_rounding +
                 factor.error * (std::fabs(difference.value) + difference.error);
  return rounded<T>(result);
}

template <typename T>
struct Reference {
  Bounded param, exp_avg, exp_avg_sq, max_exp_avg_sq;

  void step(const AdamHyper& h, double step, T grad_factor, T grad) {
    const ExactValues<T> values(h, step);
    Bounded g = scaled<T>(grad, grad_factor);
    if (!h.decoupled_weight_decay && h.weight_decay != 0) {
      g = rounded<T>(g + coefficient<T>({h.weight_decay}) * param);
    }
    exp_avg = lerp<T>(exp_avg, g, values.average);
    if (values.square.value > 0) {
      exp_avg_sq = lerp<T>(exp_avg_sq, g * g, values.square);
    } else {  // little is kept: as the sum of two products, each precise in itself
      const Bounded kept = rounded<T>(-values.square * exp_avg_sq);
      const Bounded weight = rounded<T>(Bounded{1} + values.square);
      exp_avg_sq = rounded<T>(rounded<T>(weight * g) * g + kept);
    }

    Bounded second = exp_avg_sq;
    if (h.amsgrad) {
      const Bounded previous = max_exp_avg_sq;
      max_exp_avg_sq = {std::max(second.value, previous.value),
                        std::max(second.error, previous.error)};
      second = max_exp_avg_sq;
    }
    const Bounded root = rounded<T>(square_root(second));
    const Bounded denominator =
        rounded<T>(root * values.inverse_root_correction2 + coefficient<T>({h.eps}));
    const Bounded direction = rounded<T>(exp_avg / denominator);
    const Bounded kept = h.decoupled_weight_decay ? rounded<T>(param * values.decay) : param;
    param = rounded<T>(values.minus_step_size * direction + kept);
  }
};

AdamHyper random_hyper(Random& random) {
  AdamHyper h;
  h.lr = log_uniform(random, 1e-5, 1);
  h.beta1 = choose(random, {0.0, 0.5, 0.9, uniform(random, 0, 1)});
  h.beta2 = choose(random, {0.0, 0.3, 0.5, 0.95, 0.999, uniform(random, 0, 1)});
  h.eps = log_uniform(random, 1e-12, 1e-2);
  h.weight_decay = choose(random, {0.0, log_uniform(random, 1e-4, 0.3)});
  h.amsgrad = random() % 2;
  h.decoupled_weight_decay = random() % 2;
  return h;
}

template <typename T>
void check_trajectories() {
  Random random(1);
  Comparison comparison;
  for (int run = 0; run < 2000; ++run) {
    const AdamHyper h = random_hyper(random);
    const T grad_factor =
        choose(random, {T(1), T(-1), T(1) / 1024, static_cast<T>(normal(random))});
    const double first_step = choose(random, {1.0, 2.0, 1000.0, 1e7});
    const double scale = log_uniform(random, 1e-4, 1e3);
    T param = static_cast<T>(normal(random));
    T state[3] = {};
    Reference<T> reference{{param}, {0}, {0}, {0}};
    for (int i = 0; i < 40; ++i) {
      const T grad = random() % 8 ? static_cast<T>(scale * normal(random)) : T(0);
      const bool l2 = !h.decoupled_weight_decay && h.weight_decay != 0;
      update<T>(l2, h.amsgrad, values_in<T>(h, first_step + i, grad_factor), grad, param, state);
      reference.step(h, first_step + i, grad_factor, grad);
      CHECK(comparison.holds(param, reference.param), "run ", run, " step ", i, ": param ", param,
            ", expected ", reference.param.value, " within ", reference.param.error);
      CHECK(comparison.holds(state[0], reference.exp_avg), "run ", run, " step ", i);
      CHECK(comparison.holds(state[1], reference.exp_avg_sq), "run ", run, " step ", i);
      CHECK(comparison.holds(state[2], reference.max_exp_avg_sq), "run ", run, " step ", i);
      // Weight decay feeds errors back into the gradient. Where they have grown, start afresh.
      if (reference.param.error > 1000 * kRoundoff<T> * (std::fabs(param) + h.lr)) {
        reference = {{param}, {state[0]}, {state[1]}, {state[2]}};
      }
    }
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

TEST(float_trajectories_stay_within_their_rounding_errors) { check_trajectories<float>(); }
TEST(double_trajectories_stay_within_their_rounding_errors) { check_trajectories<double>(); }

// The error after one step, in units of roundoff of what is added up: a bound to quote.
TEST(one_float_step_is_off_by_half_an_ulp_and_12_roundoffs_of_the_change) {
  Random random(2);
  for (int run = 0; run < 50000; ++run) {
    AdamHyper h = random_hyper(random);
    h.weight_decay = 0;
    const float grad = static_cast<float>(normal(random));
    float param = static_cast<float>(normal(random));
    float state[3] = {static_cast<float>(normal(random)),
                      static_cast<float>(std::fabs(normal(random)))};
    const double step = 1 + static_cast<double>(random() % 100000);
    Reference<float> reference{{param}, {state[0]}, {state[1]}, {state[2]}};
    const long double largest = std::max(std::fabs(state[0]), std::fabs(grad));
    update<float>(false, h.amsgrad, values_in<float>(h, step, 1), grad, param, state);
    reference.step(h, step, 1, grad);
    // What the step would add if the average were as large as the larger of its ends, which may
    // cancel.
    const ExactValues<float> values(h, step);
    const long double root = std::sqrt(reference.exp_avg_sq.value);
    const long double change = -values.minus_step_size.value * largest /
                               (root * values.inverse_root_correction2.value + h.eps);
    const long double error = std::fabs(param - reference.param.value) / kRoundoff<float>;
    CHECK(error <= std::fabs(reference.param.value) + 12 * change, "run ", run, ": ", error);
  }
}

// The square is not rounded before the old average is taken from it, which shows where they cancel.
TEST(a_second_moment_near_the_square_is_rounded_twice) {
  Random random(10);
  Comparison comparison;
  for (int run = 0; run < 50000; ++run) {
    AdamHyper h = random_hyper(random);
    h.beta2 = uniform(random, 0.501, 0.6);
    h.weight_decay = 0;
    const float grad = static_cast<float>(normal(random));
    float param = 0, state[3] = {0, grad * grad * static_cast<float>(uniform(random, 0.99, 1.01))};
    Reference<float> reference{{param}, {state[0]}, {state[1]}, {0}};
    update<float>(false, false, values_in<float>(h, 5, 1), grad, param, state);
    reference.step(h, 5, 1, grad);
    CHECK(comparison.holds(state[1], reference.exp_avg_sq), "run ", run);
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

template <typename T>
void check_values() {
  Random random(3);
  Comparison comparison;
  for (int run = 0; run < 20000; ++run) {
    const AdamHyper h = random_hyper(random);
    const double step = std::floor(log_uniform(random, 1, 1e7));
    const AdamValues<T> found = values_in<T>(h, step, -0.25);
    const ExactValues<T> expected(h, step);
    CHECK_EQ(found.grad_factor, T(-0.25));
    CHECK_EQ(found.eps, static_cast<T>(h.eps));
    CHECK_EQ(found.l2, static_cast<T>(h.decoupled_weight_decay ? 0.0 : h.weight_decay));
    CHECK(comparison.holds(found.decay, expected.decay), "run ", run);
    CHECK(comparison.holds(found.average, expected.average), "run ", run);
    CHECK(comparison.holds(found.inverse_root_correction2, expected.inverse_root_correction2),
          "run ", run);
    CHECK(comparison.holds(found.minus_step_size, expected.minus_step_size), "run ", run);
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

TEST(values_in_double_are_those_of_the_formulas) { check_values<double>(); }
TEST(values_in_float_are_those_of_the_formulas) { check_values<float>(); }

TEST(lerp_factor_starts_from_the_nearer_end) {
  CHECK_EQ(recap::lerp_factor(0.25), 0.25);
  CHECK_EQ(recap::lerp_factor(0.5), -0.5);
  CHECK_EQ(recap::lerp_factor(0.75), -0.25);
  CHECK_EQ(recap::lerp_factor(1.0), 0.0);
}

constexpr AdamHyper kUsual{{0.9, 0.999, 1e-8, 0.0, false, false, false}, 0.01};

AdamHyper with_betas(double beta1, double beta2) {
  AdamHyper h = kUsual;
  h.beta1 = beta1;
  h.beta2 = beta2;
  return h;
}

TEST(a_zero_gradient_with_no_history_changes_nothing) {
  Random random(4);
  for (int run = 0; run < 10000; ++run) {
    AdamHyper h = random_hyper(random);
    h.weight_decay = 0;
    const float before = static_cast<float>(normal(random));
    float param = before, state[3] = {};
    update<float>(false, h.amsgrad, values_in<float>(h, 1 + run, 1), 0.0f, param, state);
    CHECK_EQ(param, before);
    for (const float s : state) CHECK_EQ(s, 0.0f);
  }
}

TEST(beta_0_keeps_no_history) {
  Random random(5);
  for (int run = 0; run < 10000; ++run) {
    const float grad = static_cast<float>(normal(random));
    float param = 1, state[3] = {static_cast<float>(normal(random)),
                                 static_cast<float>(std::fabs(normal(random)))};
    update<float>(false, false, values_in<float>(with_betas(0, 0), 3, 1), grad, param, state);
    CHECK_EQ(state[0], grad);
    CHECK_EQ(state[1], grad * grad);
  }
}

TEST(averages_of_a_constant_gradient_do_not_drift) {
  Random random(6);
  for (int run = 0; run < 1000; ++run) {
    const float grad = static_cast<float>(normal(random));
    const AdamHyper h =
        with_betas(uniform(random, 0, 1), choose(random, {0.9, 0.99, 0.999, 0.9999}));
    const AdamValues<float> values = values_in<float>(h, 10, 1);
    float param = 1, state[3] = {grad, grad * grad};
    for (int step = 0; step < 1000; ++step) update<float>(false, false, values, grad, param, state);
    CHECK_EQ(state[0], grad);
    // A second moment that loses 1e-8 of itself in each step would be hundreds of roundoffs off.
    const double square = static_cast<double>(grad) * grad;
    CHECK(std::fabs(state[1] - square) <= 2 * kRoundoff<float> * square, "beta2 ", h.beta2, ": ",
          state[1], " for ", square);
  }
}

TEST(the_first_step_is_as_long_as_the_learning_rate) {
  Random random(7);
  for (int run = 0; run < 10000; ++run) {
    AdamHyper h = random_hyper(random);
    h.weight_decay = 0;
    const double grad = log_uniform(random, 1e-3, 1e3) * (random() % 2 ? 1 : -1);
    double param = 0, state[3] = {};
    update<double>(false, h.amsgrad, values_in<double>(h, 1, 1), grad, param, state);
    const double expected = -h.lr * grad / (std::fabs(grad) + h.eps);
    CHECK(std::fabs(param - expected) <= 1e-14 * std::fabs(expected), param, " for ", expected);
  }
}

TEST(maximizing_mirrors_minimizing) {
  Random random(8);
  for (int run = 0; run < 10000; ++run) {
    const AdamHyper h = random_hyper(random);
    float down = static_cast<float>(normal(random)), up = down, down_state[3] = {},
          up_state[3] = {};
    for (int step = 1; step <= 3; ++step) {
      const float grad = static_cast<float>(normal(random));
      update<float>(true, h.amsgrad, values_in<float>(h, step, 1), grad, down, down_state);
      update<float>(true, h.amsgrad, values_in<float>(h, step, -1), -grad, up, up_state);
      CHECK_EQ(up, down);
      for (int k = 0; k < 3; ++k) CHECK_EQ(up_state[k], down_state[k]);
    }
  }
}

TEST(amsgrad_keeps_the_largest_second_moment) {
  Random random(9);
  for (int run = 0; run < 1000; ++run) {
    AdamHyper h = random_hyper(random);
    float param = 0, state[3] = {}, largest = 0;
    for (int step = 1; step <= 20; ++step) {
      const float grad = static_cast<float>(log_uniform(random, 1e-3, 1e3));
      update<float>(false, true, values_in<float>(h, step, 1), grad, param, state);
      largest = std::max(largest, state[1]);
      CHECK_EQ(state[2], largest);
    }
  }
}

TEST(amsgrad_is_adam_while_the_second_moment_grows) {
  float plain = 1, plain_state[3] = {}, amsgrad = 1, amsgrad_state[3] = {};
  for (int step = 1; step <= 100; ++step) {
    const AdamValues<float> values = values_in<float>(kUsual, step, 1);
    update<float>(false, false, values, static_cast<float>(step), plain, plain_state);
    update<float>(false, true, values, static_cast<float>(step), amsgrad, amsgrad_state);
    CHECK_EQ(amsgrad, plain, "step ", step);
  }
}

TEST(a_square_is_weighted_before_it_can_overflow) {
  const float grad = 2e19f;  // its square exceeds the largest float
  for (const double beta2 : {0.5, 0.9, 0.999}) {
    for (const float before : {0.0f, 1e37f}) {
      float param = 1, state[3] = {0, before};
      update<float>(false, false, values_in<float>(with_betas(0.9, beta2), 2, 1), grad, param,
                    state);
      const double expected = beta2 * before + (1 - beta2) * static_cast<double>(grad) * grad;
      CHECK(std::fabs(state[1] - expected) <= 4 * kRoundoff<float> * expected, "beta2 ", beta2,
            ": ", state[1], " for ", expected);
    }
  }
}

template <typename T>
void check_overflow(T huge) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (const double beta2 : {0.3, 0.5, 0.6, 0.9, 0.999}) {
    for (const bool amsgrad : {false, true}) {
      T param = 1, state[3] = {};
      for (int step = 1; step <= 6; ++step) {
        const T before = param;
        const T grad = step % 3 == 1 ? huge : step % 3 == 2 ? T(1) : T(0);
        update<T>(false, amsgrad, values_in<T>(with_betas(0.9, beta2), step, 1), grad, param,
                  state);
        CHECK_EQ(state[1], kInfinity, "beta2 ", beta2, " step ", step);
        if (amsgrad) CHECK_EQ(state[2], kInfinity, "beta2 ", beta2, " step ", step);
        CHECK_EQ(param, before, "beta2 ", beta2, " step ", step);
      }
    }
  }
}

TEST(an_overflowed_float_second_moment_stays_infinite_and_stops_the_parameter) {
  check_overflow(1e30f);
}
TEST(an_overflowed_double_second_moment_stays_infinite_and_stops_the_parameter) {
  check_overflow(1e300);
}

TEST(an_overflowed_second_moment_without_memory_is_nan_in_the_next_step) {
  float param = 1, state[3] = {};
  const auto step = [&](int count, float grad) {
    update<float>(false, false, values_in<float>(with_betas(0.9, 0.0), count, 1), grad, param,
                  state);
  };
  step(1, 1e30f);
  CHECK_EQ(state[1], std::numeric_limits<float>::infinity());
  CHECK_EQ(param, 1.0f);
  step(2, 1.0f);
  CHECK(std::isnan(state[1]), "as in torch, which multiplies it by zero");
}

TEST(a_nan_gradient_shows) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const bool l2 : {false, true}) {
    for (const float second : {0.0f, 1.0f, std::numeric_limits<float>::infinity()}) {
      float param = 1, state[3] = {1, second, 1};
      update<float>(l2, true, values_in<float>(kUsual, 2, 1), kNan, param, state);
      CHECK(std::isnan(param), "second moment ", second);
      for (int k = 0; k < 3; ++k)
        CHECK(std::isnan(state[k]), "state ", k, ", second moment ", second);
      update<float>(l2, true, values_in<float>(kUsual, 3, 1), 1.0f, param, state);
      CHECK(std::isnan(param) && std::isnan(state[2]), "NaN went away");
    }
  }
}

TEST(decoupled_weight_decay_scales_the_parameter_alone) {
  AdamHyper h = kUsual;
  h.weight_decay = 0.5;
  h.decoupled_weight_decay = true;
  h.lr = 0.5;
  float param = 3, state[3] = {};
  update<float>(false, false, values_in<float>(h, 1, 1), 0.0f, param, state);
  CHECK_EQ(param, 2.25f);
  CHECK_EQ(state[0], 0.0f);
}

TEST(weight_decay_joins_the_gradient) {
  AdamHyper h = kUsual;
  h.weight_decay = 0.5;
  float param = 4, state[3] = {};
  float other = 4, other_state[3] = {};
  update<float>(true, false, values_in<float>(h, 1, 1), 1.0f, param, state);
  update<float>(false, false, values_in<float>(kUsual, 1, 1), 3.0f, other, other_state);
  CHECK_EQ(param, other);
  CHECK_EQ(state[0], other_state[0]);
  CHECK_EQ(state[1], other_state[1]);
}

}  // namespace
