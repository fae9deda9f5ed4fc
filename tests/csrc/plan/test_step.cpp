// What make_values chooses and computes for each algorithm.
#include "plan/step.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

namespace {

using recap::Algorithm;
using recap::Hyper;
using recap::Update;
using recap::Values;

Hyper adam(double weight_decay, bool amsgrad, bool decoupled) {
  Hyper hyper;
  hyper.algorithm = Algorithm::adam;
  hyper.lr = 0.1;
  hyper.adam = {0.9, 0.99, 1e-8, weight_decay, amsgrad, decoupled};
  return hyper;
}

Hyper adagrad(double weight_decay) {
  Hyper hyper;
  hyper.algorithm = Algorithm::adagrad;
  hyper.lr = 0.1;
  hyper.adagrad = {0.5, 1e-10, weight_decay};
  return hyper;
}

Hyper sgd(double momentum, double weight_decay, bool nesterov) {
  Hyper hyper;
  hyper.algorithm = Algorithm::sgd;
  hyper.lr = 0.1;
  hyper.sgd = {momentum, 0.25, weight_decay, nesterov};
  return hyper;
}

Hyper rowwise_adagrad(double weight_decay, bool decoupled) {
  Hyper hyper;
  hyper.algorithm = Algorithm::rowwise_adagrad;
  hyper.lr = 0.1;
  hyper.rowwise_adagrad = {1e-8, weight_decay, decoupled};
  return hyper;
}

Hyper lion(double weight_decay) {
  Hyper hyper;
  hyper.algorithm = Algorithm::lion;
  hyper.lr = 0.1;
  hyper.lion = {0.9, 0.75, weight_decay};
  return hyper;
}

Hyper rmsprop(double momentum, bool centered) {
  Hyper hyper;
  hyper.algorithm = Algorithm::rmsprop;
  hyper.lr = 0.1;
  hyper.rmsprop = {0.75, 1e-8, 0.1, momentum, centered};
  return hyper;
}

void check_update(const Hyper& hyper, Update expected, const char* name) {
  const Update found = recap::make_values(hyper, 1, false, 1).update;
  CHECK_EQ(static_cast<int>(found), static_cast<int>(expected), "for ", name);
}

#define CHECK_UPDATE(hyper, name) check_update(hyper, Update::name, #name)

TEST(the_update_follows_from_the_hyperparameters) {
  CHECK_UPDATE(adam(0, false, false), adam);
  CHECK_UPDATE(adam(0.1, false, false), adam_l2);
  CHECK_UPDATE(adam(0, true, false), adam_amsgrad);
  CHECK_UPDATE(adam(0.1, true, false), adam_amsgrad_l2);
  CHECK_UPDATE(adagrad(0), adagrad);
  CHECK_UPDATE(adagrad(0.1), adagrad_l2);
  CHECK_UPDATE(sgd(0, 0, false), sgd);
  CHECK_UPDATE(sgd(0, 0.1, false), sgd_l2);
  CHECK_UPDATE(sgd(0.9, 0, false), sgd_momentum);
  CHECK_UPDATE(sgd(0.9, 0.1, false), sgd_momentum_l2);
  CHECK_UPDATE(sgd(0.9, 0, true), sgd_nesterov);
  CHECK_UPDATE(sgd(0.9, 0.1, true), sgd_nesterov_l2);
  CHECK_UPDATE(lion(0), lion);
  CHECK_UPDATE(rmsprop(0, false), rmsprop);
  CHECK_UPDATE(rmsprop(0.9, false), rmsprop_momentum);
  CHECK_UPDATE(rmsprop(0, true), rmsprop_centered);
  CHECK_UPDATE(rmsprop(0.9, true), rmsprop_centered_momentum);
}

TEST(decoupled_weight_decay_is_no_l2_term) {
  CHECK_UPDATE(adam(0.1, false, true), adam);
  CHECK_UPDATE(adam(0.1, true, true), adam_amsgrad);
  const Values values = recap::make_values(adam(0.1, false, true), 1, false, 1);
  CHECK_EQ(values.float64.adam.l2, 0.0);
  CHECK_EQ(values.float64.adam.decay, 1 - 0.1 * 0.1);
}

TEST(updates_with_a_momentum_or_a_maximum_have_their_states) {
  CHECK_EQ(recap::UpdateType<Update::adam>::type::kStates, 2);
  CHECK_EQ(recap::UpdateType<Update::adam_l2>::type::kStates, 2);
  CHECK_EQ(recap::UpdateType<Update::adam_amsgrad>::type::kStates, 3);
  CHECK_EQ(recap::UpdateType<Update::adam_amsgrad_l2>::type::kStates, 3);
  CHECK_EQ(recap::UpdateType<Update::adagrad>::type::kStates, 1);
  CHECK_EQ(recap::UpdateType<Update::adagrad_l2>::type::kStates, 1);
  CHECK_EQ(recap::UpdateType<Update::sgd>::type::kStates, 0);
  CHECK_EQ(recap::UpdateType<Update::sgd_l2>::type::kStates, 0);
  CHECK_EQ(recap::UpdateType<Update::sgd_momentum>::type::kStates, 1);
  CHECK_EQ(recap::UpdateType<Update::sgd_momentum_l2>::type::kStates, 1);
  CHECK_EQ(recap::UpdateType<Update::sgd_nesterov>::type::kStates, 1);
  CHECK_EQ(recap::UpdateType<Update::sgd_nesterov_l2>::type::kStates, 1);
}

// The factor of every algorithm for these hyperparameters.
std::vector<double> grad_factors(bool maximize, double grad_scale, double clip = 1.0) {
  std::vector<double> factors;
  for (Hyper hyper : {adam(0, false, false), adagrad(0), sgd(0, 0, false),
                      rowwise_adagrad(0, false), lion(0), rmsprop(0, false)}) {
    hyper.maximize = maximize;
    const Values values = recap::make_values(hyper, 1, false, grad_scale, clip);
#define RECAP_CASE(name, ...) \
  case Algorithm::name: factors.push_back(values.float64.name.grad_factor); break;
    switch (hyper.algorithm) { RECAP_ALGORITHMS(RECAP_CASE) }
#undef RECAP_CASE
  }
  return factors;
}

TEST(gradients_are_multiplied_by_what_clips_them) {
  for (const double factor : grad_factors(false, 1, 0.3)) CHECK_EQ(factor, 0.3);
  for (const double factor : grad_factors(true, 4, 0.3)) CHECK_EQ(factor, -0.3 / 4);
}

TEST(gradients_are_divided_by_their_scale) {
  for (const double factor : grad_factors(false, 1)) CHECK_EQ(factor, 1.0);
  for (const double factor : grad_factors(true, 1)) CHECK_EQ(factor, -1.0);
  for (const double factor : grad_factors(false, 65536)) CHECK_EQ(factor, 0x1p-16);
  for (const double factor : grad_factors(true, 65536)) CHECK_EQ(factor, -0x1p-16);
  // The reciprocal of a scale that is no power of two is that of float, as in GradScaler.
  for (const double factor : grad_factors(false, 3))
    CHECK_EQ(factor, static_cast<double>(1.0f / 3));
}

TEST(adam_values_depend_on_the_step) {
  const Values values = recap::make_values(adam(0.1, false, false), 2, false, 1);
  CHECK_EQ(values.float64.adam.l2, 0.1);
  CHECK_EQ(values.float64.adam.decay, 1.0);
  CHECK_EQ(values.float64.adam.eps, 1e-8);
  CHECK(std::fabs(values.float64.adam.minus_step_size + 0.1 / 0.19) < 1e-15);
  CHECK(std::fabs(values.float64.adam.inverse_root_correction2 - 1 / std::sqrt(0.0199)) < 1e-14);
}

TEST(adagrad_values_depend_on_the_step) {
  const Values values = recap::make_values(adagrad(0.1), 5, false, 1);
  CHECK_EQ(values.float64.adagrad.l2, 0.1);
  CHECK_EQ(values.float64.adagrad.eps, 1e-10);
  CHECK_EQ(values.float64.adagrad.minus_step_size, -0.1 / 3);
}

TEST(sgd_values_depend_on_whether_the_buffer_is_new) {
  const Values first = recap::make_values(sgd(0.9, 0.1, true), 7, true, 1);
  CHECK_EQ(first.float64.sgd.buffer_decay, 0.0);
  CHECK_EQ(first.float64.sgd.buffer_gain, 1.0);
  const Values later = recap::make_values(sgd(0.9, 0.1, true), 7, false, 1);
  CHECK_EQ(later.float64.sgd.buffer_decay, 0.9);
  CHECK_EQ(later.float64.sgd.buffer_gain, 0.75);
  for (const Values& values : {first, later}) {
    CHECK_EQ(values.float64.sgd.momentum, 0.9);
    CHECK_EQ(values.float64.sgd.l2, 0.1);
    CHECK_EQ(values.float64.sgd.minus_lr, -0.1);
  }
}

TEST(lion_and_rmsprop_values_do_not_depend_on_the_step) {
  const auto lions = recap::make_values(lion(0.1), 5, false, 1).float64.lion;
  CHECK_EQ(lions.decay, 1 - 0.1 * 0.1);
  CHECK_EQ(lions.blend, 1 - 0.9);
  CHECK_EQ(lions.average, 0.25);
  CHECK_EQ(lions.minus_lr, -0.1);
  const auto rmsprops = recap::make_values(rmsprop(0.9, true), 5, false, 1).float64.rmsprop;
  CHECK_EQ(rmsprops.l2, 0.1);
  CHECK_EQ(rmsprops.average, 0.25);
  CHECK_EQ(rmsprops.momentum, 0.9);
  CHECK_EQ(rmsprops.eps, 1e-8);
  CHECK_EQ(rmsprops.minus_lr, -0.1);
}

// Every member, in the order of the struct.
template <typename T, typename Struct>
std::vector<T> members(const Struct& values) {
  std::vector<T> all(sizeof(Struct) / sizeof(T));
  memcpy(all.data(), &values, sizeof(Struct));
  return all;
}

template <template <typename> class Type>
void check_rounding(const Type<float>& float32, const Type<double>& float64) {
  const std::vector<float> found = members<float>(float32);
  const std::vector<double> exact = members<double>(float64);
  CHECK_EQ(found.size(), exact.size());
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK_EQ(found[i], static_cast<float>(exact[i]), "member ", i);
  }
}

// Of any values, to compare: their bytes, padding aside.
std::vector<double> all_values(const Hyper& hyper, const Values& values) {
  std::vector<double> all = {static_cast<double>(values.update)};
  const auto append = [&all](const auto& more) { all.insert(all.end(), more.begin(), more.end()); };
#define RECAP_CASE(name, ...)                     \
  case Algorithm::name:                           \
    append(members<double>(values.float64.name)); \
    append(members<float>(values.float32.name));  \
    break;
  switch (hyper.algorithm) { RECAP_ALGORITHMS(RECAP_CASE) }
#undef RECAP_CASE
  return all;
}

TEST(a_values_maker_remembers_the_right_corrections) {
  recap::ValuesMaker maker;
  const auto make = [&maker](const Hyper& hyper, double step, bool first) {
    Values values;
    maker.make(hyper, step, first, recap::gradient_factor(3, 1), values);
    return values;
  };
  std::vector<Hyper> hypers = {
      adagrad(0.1), sgd(0.9, 0, true), adam(0.1, true, false), rowwise_adagrad(0.1, true),
      lion(0.1),    rmsprop(0.9, true)};
  for (int i = 0; i < 20; ++i) {  // more corrections than it remembers
    hypers.push_back(adam(0, false, false));
    hypers.back().adam.beta1 = i % 7 / 8.0;
    hypers.back().adam.beta2 = 1 - i / 40.0;
    hypers.back().lr = i;
  }
  for (const double step : {1.0, 2.0, 2.0, 1000.0, 3.0, 1.0}) {
    for (const Hyper& hyper : hypers) {
      CHECK(all_values(hyper, make(hyper, step, step == 1)) ==
                all_values(hyper, recap::make_values(hyper, step, step == 1, 3, 1)),
            "at step ", step);
      CHECK(all_values(hyper, make(hyper, step, false)) ==
                all_values(hyper, recap::make_values(hyper, step, false, 3, 1)),
            "at step ", step);
    }
  }
}

TEST(float_values_are_the_double_ones_rounded) {
  const Values a = recap::make_values(adam(0.1, true, false), 3, false, 7);
  check_rounding<recap::AdamValues>(a.in<float>().adam, a.in<double>().adam);
  const Values b = recap::make_values(adagrad(0.1), 3, false, 7);
  check_rounding<recap::AdagradValues>(b.in<float>().adagrad, b.in<double>().adagrad);
  const Values c = recap::make_values(sgd(0.9, 0.1, true), 3, false, 7);
  check_rounding<recap::SgdValues>(c.in<float>().sgd, c.in<double>().sgd);
  const Values d = recap::make_values(rowwise_adagrad(0.1, true), 3, false, 7);
  check_rounding<recap::RowwiseAdagradValues>(d.in<float>().rowwise_adagrad,
                                              d.in<double>().rowwise_adagrad);
  const Values e = recap::make_values(lion(0.1), 3, false, 7);
  check_rounding<recap::LionValues>(e.in<float>().lion, e.in<double>().lion);
  const Values f = recap::make_values(rmsprop(0.9, true), 3, false, 7);
  check_rounding<recap::RmspropValues>(f.in<float>().rmsprop, f.in<double>().rmsprop);
}

}  // namespace
