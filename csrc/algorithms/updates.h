// The list of algorithms and of the updates that a slot can take. Enums, the tables of every engine
// and the unions of hyperparameters and values follow from it; an algorithm says the rest of itself
// in its traits (traits.h).
#pragma once

#include <cstdint>

#include "adagrad.h"
#include "adam.h"
#include "lion.h"
#include "rmsprop.h"
#include "rowwise_adagrad.h"
#include "sgd.h"
#include "traits.h"

// X(name, Traits): `name` is what Python's optimizers have as `algorithm`.
#define RECAP_ALGORITHMS(X)                \
  X(adam, AdamTraits)                      \
  X(adagrad, AdagradTraits)                \
  X(sgd, SgdTraits)                        \
  X(rowwise_adagrad, RowwiseAdagradTraits) \
  X(lion, LionTraits)                      \
  X(rmsprop, RmspropTraits)

// X(name, type): options resolved, so that an engine runs a loop without a branch on them. A type
// has kStates, and in kNeverNegative a bit for each state that is a sum or an average of squares.
#define RECAP_ELEMENT_UPDATES(X)             \
  X(adam, Adam<false, false>)                \
  X(adam_l2, Adam<true, false>)              \
  X(adam_amsgrad, Adam<false, true>)         \
  X(adam_amsgrad_l2, Adam<true, true>)       \
  X(adagrad, Adagrad<false>)                 \
  X(adagrad_l2, Adagrad<true>)               \
  X(sgd, Sgd<false, false, false>)           \
  X(sgd_l2, Sgd<true, false, false>)         \
  X(sgd_momentum, Sgd<false, true, false>)   \
  X(sgd_momentum_l2, Sgd<true, true, false>) \
  X(sgd_nesterov, Sgd<false, true, true>)    \
  X(sgd_nesterov_l2, Sgd<true, true, true>)  \
  X(lion, Lion)                              \
  X(rmsprop, Rmsprop<false, false>)          \
  X(rmsprop_momentum, Rmsprop<true, false>)  \
  X(rmsprop_centered, Rmsprop<false, true>)  \
  X(rmsprop_centered_momentum, Rmsprop<true, true>)

// Of whole rows; on the CPU only.
#define RECAP_ROW_UPDATES(X)                \
  X(rowwise_adagrad, RowwiseAdagrad<false>) \
  X(rowwise_adagrad_l2, RowwiseAdagrad<true>)

namespace recap {

#define RECAP_NAME_OF(name, ...) name,
#define RECAP_ONE_OF(name, ...) +1
enum class Algorithm : uint8_t { RECAP_ALGORITHMS(RECAP_NAME_OF) };
enum class Update : uint8_t {
  RECAP_ELEMENT_UPDATES(RECAP_NAME_OF) RECAP_ROW_UPDATES(RECAP_NAME_OF)
};
constexpr int kUpdates = 0 RECAP_ELEMENT_UPDATES(RECAP_ONE_OF);
constexpr int kRowUpdates = kUpdates RECAP_ROW_UPDATES(RECAP_ONE_OF);  // and those of elements
#undef RECAP_NAME_OF
#undef RECAP_ONE_OF

template <Update update>
struct UpdateType;
#define RECAP_TYPE_OF(name, ...)    \
  template <>                       \
  struct UpdateType<Update::name> { \
    using type = __VA_ARGS__;       \
  };
RECAP_ELEMENT_UPDATES(RECAP_TYPE_OF)
RECAP_ROW_UPDATES(RECAP_TYPE_OF)
#undef RECAP_TYPE_OF

// The values of one update in the type it computes in; which member counts follows from the update.
template <typename T>
union UpdateValues {
#define RECAP_VALUES_OF(name, Traits)                          \
  typename Traits::template Values<T> name;                    \
  RECAP_INLINE const typename Traits::template Values<T>& get( \
      const typename Traits::template Values<T>*) const {      \
    return name;                                               \
  }
  RECAP_ALGORITHMS(RECAP_VALUES_OF)
#undef RECAP_VALUES_OF

  template <typename Type>
  RECAP_INLINE const typename Type::template Values<T>& of() const {
    return get(static_cast<const typename Type::template Values<T>*>(nullptr));
  }
};

}  // namespace recap
