// SGD against the formulas of torch.optim.SGD, in long double.
#include "algorithms/sgd.h"

#include "bounded.h"
#include "check.h"

namespace {

using namespace bounded;
using SgdHyper = WithLr<recap::SgdHyper>;
using recap::SgdValues;

template <typename T>
SgdValues<T> values_in(const SgdHyper& hyper, bool first, double grad_factor) {
  return in_type<T>(recap::sgd_values(hyper, {hyper.lr, 1.0, first, 1.0}, grad_factor));
}

template <bool kL2, typename T>
void update_with(const SgdHyper& h, const SgdValues<T>& values, T grad, T& param, T& buffer) {
  if (h.momentum == 0) {
    recap::Sgd<kL2, false, false>::update(values, grad, param, static_cast<T*>(nullptr));
  } else if (h.nesterov) {
    recap::Sgd<kL2, true, true>::update(values, grad, param, &buffer);
  } else {
    recap::Sgd<kL2, true, false>::update(values, grad, param, &buffer);
  }
}

template <typename T>
void update(const SgdHyper& h, bool first, T grad_factor, T grad, T& param, T& buffer) {
  const SgdValues<T> values = values_in<T>(h, first, grad_factor);
  if (h.weight_decay != 0) {
    update_with<true, T>(h, values, grad, param, buffer);
  } else {
    update_with<false, T>(h, values, grad, param, buffer);
  }
}

template <typename T>
struct Reference {
  Bounded param, buffer;

  void step(const SgdHyper& h, bool first, T grad_factor, T grad) {
    Bounded g = scaled<T>(grad, grad_factor);
    if (h.weight_decay != 0) g = rounded<T>(g + coefficient<T>({h.weight_decay}) * param);
    if (h.momentum != 0) {
      const Bounded momentum = coefficient<T>({h.momentum});
      const Bounded gain = coefficient<T>(rounded<double>(Bounded{1} - Bounded{h.dampening}));
      buffer = first ? g : rounded<T>(rounded<T>(momentum * buffer) + gain * g);
      g = h.nesterov ? rounded<T>(g + momentum * buffer) : buffer;
    }
    param = rounded<T>(param - coefficient<T>({h.lr}) * g);
  }
};

SgdHyper random_hyper(Random& random) {
  SgdHyper h;
  h.lr = log_uniform(random, 1e-5, 1);
  h.momentum = choose(random, {0.0, 0.5, 0.9, uniform(random, 0, 1)});
  h.dampening = choose(random, {0.0, 1.0, uniform(random, 0, 1)});
  h.weight_decay = choose(random, {0.0, log_uniform(random, 1e-4, 0.3)});
  h.nesterov = random() % 2;
  return h;
}

template <typename T>
void check_trajectories() {
  Random random(1);
  Comparison comparison;
  for (int run = 0; run < 2000; ++run) {
    const SgdHyper h = random_hyper(random);
    const T grad_factor =
        choose(random, {T(1), T(-1), T(1) / 1024, static_cast<T>(normal(random))});
    const double scale = log_uniform(random, 1e-4, 1e3);
    T param = static_cast<T>(normal(random)), buffer = 0;
    Reference<T> reference{{param}, {0}};
    for (int i = 0; i < 40; ++i) {
      const T grad = random() % 8 ? static_cast<T>(scale * normal(random)) : T(0);
      update<T>(h, i == 0, grad_factor, grad, param, buffer);
      reference.step(h, i == 0, grad_factor, grad);
      CHECK(comparison.holds(param, reference.param), "run ", run, " step ", i, ": param ", param,
            ", expected ", reference.param.value, " within ", reference.param.error);
      CHECK(comparison.holds(buffer, reference.buffer), "run ", run, " step ", i);
    }
  }
  CHECK(comparison.largest_share() > 0.5L, "no error came near its bound");
}

TEST(float_trajectories_stay_within_their_rounding_errors) { check_trajectories<float>(); }
TEST(double_trajectories_stay_within_their_rounding_errors) { check_trajectories<double>(); }

long double half_ulp(float a) {
  return (std::nextafter(std::fabs(a), std::numeric_limits<float>::infinity()) - std::fabs(a)) /
         2.0L;
}

TEST(a_plain_step_is_rounded_once) {
  Random random(2);
  for (int run = 0; run < 100000; ++run) {
    SgdHyper h{};
    h.lr = log_uniform(random, 1e-5, 1);
    const float before = static_cast<float>(normal(random)),
                grad = static_cast<float>(normal(random));
    float param = before, buffer = 0;
    update<float>(h, false, 1.0f, grad, param, buffer);
    const long double exact = before - static_cast<long double>(static_cast<float>(h.lr)) * grad;
    CHECK(std::fabs(param - exact) <= half_ulp(param), "run ", run);
  }
}

TEST(a_nesterov_look_ahead_is_rounded_once) {
  Random random(5);
  for (int run = 0; run < 100000; ++run) {
    const SgdHyper h{{uniform(random, 0.5, 1), 0, 0, true}, 1};
    const float grad = static_cast<float>(normal(random));
    float param = 0, buffer = static_cast<float>(normal(random));
    update<float>(h, false, 1.0f, grad, param, buffer);
    const long double exact =
        -(grad + static_cast<long double>(static_cast<float>(h.momentum)) * buffer);
    CHECK(std::fabs(param - exact) <= half_ulp(param), "run ", run);
  }
}

TEST(a_zero_gradient_changes_nothing) {
  float param = 0.3f, buffer = 0;
  for (const bool nesterov : {false, true}) {
    for (const bool first : {false, true}) {
      update<float>({{0.9, 0, 0, nesterov}, 0.1}, first, 1.0f, 0.0f, param, buffer);
      CHECK_EQ(param, 0.3f);
      CHECK_EQ(buffer, 0.0f);
    }
  }
}

TEST(a_learning_rate_of_0_moves_the_buffer_alone) {
  float param = 0.3f, buffer = 0.5f;
  update<float>({{0.5, 0, 0, false}, 0}, false, 1.0f, 2.0f, param, buffer);
  CHECK_EQ(param, 0.3f);
  CHECK_EQ(buffer, 2.25f);
}

TEST(the_first_momentum_step_starts_the_buffer_as_the_gradient) {
  Random random(3);
  for (int run = 0; run < 10000; ++run) {
    SgdHyper h = random_hyper(random);
    h.weight_decay = 0;
    h.momentum = 0.5;
    const float grad = static_cast<float>(normal(random));
    float param = 0, buffer = 0;
    update<float>(h, true, 1.0f, grad, param, buffer);
    CHECK_EQ(buffer, grad, "dampening ", h.dampening);
    const float direction = h.nesterov ? grad + 0.5f * grad : grad;
    CHECK_EQ(param, -static_cast<float>(h.lr) * direction);
  }
}

TEST(dampening_counts_from_the_second_step) {
  float param = 0, buffer = 0;
  const SgdHyper h{{0.5, 0.75, 0, false}, 1};
  update<float>(h, true, 1.0f, 4.0f, param, buffer);
  CHECK_EQ(buffer, 4.0f);
  CHECK_EQ(param, -4.0f);
  update<float>(h, false, 1.0f, 8.0f, param, buffer);
  CHECK_EQ(buffer, 4.0f);  // 0.5 * 4 + 0.25 * 8
  CHECK_EQ(param, -8.0f);
}

TEST(full_dampening_keeps_the_gradient_out) {
  float param = 1, buffer = 2;
  update<float>({{0.5, 1, 0, false}, 1}, false, 1.0f, 1e6f, param, buffer);
  CHECK_EQ(buffer, 1.0f);
  CHECK_EQ(param, 0.0f);
}

TEST(nesterov_looks_ahead) {
  float param = 0, buffer = 2;
  update<float>({{0.5, 0, 0, true}, 1}, false, 1.0f, 4.0f, param, buffer);
  CHECK_EQ(buffer, 5.0f);  // 0.5 * 2 + 4
  CHECK_EQ(param, -6.5f);  // 4 + 0.5 * 5
}

TEST(weight_decay_joins_the_gradient) {
  float param = 4, buffer = 0;
  update<float>({{0, 0, 0.25, false}, 0.5}, false, 1.0f, 1.0f, param, buffer);
  CHECK_EQ(param, 3.0f);  // 4 - 0.5 * (1 + 0.25 * 4)
}

TEST(maximizing_mirrors_minimizing) {
  Random random(4);
  for (int run = 0; run < 1000; ++run) {
    const SgdHyper h = random_hyper(random);
    float down = static_cast<float>(normal(random)), up = down, down_buffer = 0, up_buffer = 0;
    for (int step = 0; step < 3; ++step) {
      const float grad = static_cast<float>(normal(random));
      update<float>(h, step == 0, 1.0f, grad, down, down_buffer);
      update<float>(h, step == 0, -1.0f, -grad, up, up_buffer);
      CHECK_EQ(up, down);
      CHECK_EQ(up_buffer, down_buffer);
    }
  }
}

}  // namespace
