// Every update that a slot can take: the algorithms with their options resolved, so that an engine
// runs a loop without a branch on hyperparameters.
#pragma once

#include <cstdint>

#include "adagrad.h"
#include "adam.h"
#include "rowwise_adagrad.h"
#include "sgd.h"

namespace recap {

enum class Update : uint8_t {
  adam,
  adam_l2,
  adam_amsgrad,
  adam_amsgrad_l2,
  adagrad,
  adagrad_l2,
  sgd,
  sgd_l2,
  sgd_momentum,
  sgd_momentum_l2,
  sgd_nesterov,
  sgd_nesterov_l2,
  rowwise_adagrad,
  rowwise_adagrad_l2,
};
constexpr int kUpdates = 12;     // of elements
constexpr int kRowUpdates = 14;  // and with those that take whole rows
constexpr int kMaxStates = 3;

template <Update update>
struct UpdateType;
template <>
struct UpdateType<Update::adam> {
  using type = Adam<false, false>;
};
template <>
struct UpdateType<Update::adam_l2> {
  using type = Adam<true, false>;
};
template <>
struct UpdateType<Update::adam_amsgrad> {
  using type = Adam<false, true>;
};
template <>
struct UpdateType<Update::adam_amsgrad_l2> {
  using type = Adam<true, true>;
};
template <>
struct UpdateType<Update::adagrad> {
  using type = Adagrad<false>;
};
template <>
struct UpdateType<Update::adagrad_l2> {
  using type = Adagrad<true>;
};
template <>
struct UpdateType<Update::sgd> {
  using type = Sgd<false, false, false>;
};
template <>
struct UpdateType<Update::sgd_l2> {
  using type = Sgd<true, false, false>;
};
template <>
struct UpdateType<Update::sgd_momentum> {
  using type = Sgd<false, true, false>;
};
template <>
struct UpdateType<Update::sgd_momentum_l2> {
  using type = Sgd<true, true, false>;
};
template <>
struct UpdateType<Update::sgd_nesterov> {
  using type = Sgd<false, true, true>;
};
template <>
struct UpdateType<Update::sgd_nesterov_l2> {
  using type = Sgd<true, true, true>;
};
template <>
struct UpdateType<Update::rowwise_adagrad> {
  using type = RowwiseAdagrad<false>;
};
template <>
struct UpdateType<Update::rowwise_adagrad_l2> {
  using type = RowwiseAdagrad<true>;
};

// The values of one update in the type it computes in; which member counts follows from the update.
template <typename T>
union UpdateValues {
  AdamValues<T> adam;
  AdagradValues<T> adagrad;
  SgdValues<T> sgd;
  RowwiseAdagradValues<T> rowwise_adagrad;

  RECAP_INLINE const AdamValues<T>& get(const AdamValues<T>*) const { return adam; }
  RECAP_INLINE const AdagradValues<T>& get(const AdagradValues<T>*) const { return adagrad; }
  RECAP_INLINE const SgdValues<T>& get(const SgdValues<T>*) const { return sgd; }
  RECAP_INLINE const RowwiseAdagradValues<T>& get(const RowwiseAdagradValues<T>*) const {
    return rowwise_adagrad;
  }

  template <typename Algorithm>
  RECAP_INLINE const typename Algorithm::template Values<T>& of() const {
    return get(static_cast<const typename Algorithm::template Values<T>*>(nullptr));
  }
};

}  // namespace recap
