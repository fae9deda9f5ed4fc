#include "scalar_engine.h"

#include <utility>

#include "numerics/storage.h"

namespace scalar {
namespace {

template <typename Algorithm, typename T>
void update_elements(const recap::Values& values, const recap::Slot& slot, const void* grad) {
  using C = typename recap::Compute<T>::type;
  const auto& h = values.in<C>().template of<Algorithm>();
  for (int64_t i = 0; i < slot.size; ++i) {
    T& param = static_cast<T*>(slot.param)[i];
    C wide_param = recap::load(param);
    C wide_state[recap::kMaxStates] = {};
    for (int k = 0; k < Algorithm::kStates; ++k) {
      wide_state[k] = recap::load(static_cast<T*>(slot.state[k])[i]);
    }
    Algorithm::update(h, recap::load(static_cast<const T*>(grad)[i]), wide_param, wide_state);
    recap::store(wide_param, param);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      recap::store(wide_state[k], static_cast<T*>(slot.state[k])[i]);
    }
  }
}

template <typename T, int... kUpdate>
void update_slot(const recap::Values& values, const recap::Slot& slot, const void* grad,
                 std::integer_sequence<int, kUpdate...>) {
  const auto choose = [&](auto update) {
    using Algorithm = typename recap::UpdateType<static_cast<recap::Update>(update())>::type;
    if (update() == static_cast<int>(values.update))
      update_elements<Algorithm, T>(values, slot, grad);
  };
  (choose(std::integral_constant<int, kUpdate>()), ...);
}

}  // namespace

void update(const recap::Values& values, const recap::Slot& slot, const void* grad) {
  constexpr std::make_integer_sequence<int, recap::kUpdates> kAll;
  switch (slot.dtype) {
    case recap::Dtype::float32: return update_slot<float>(values, slot, grad, kAll);
    case recap::Dtype::float64: return update_slot<double>(values, slot, grad, kAll);
    case recap::Dtype::bfloat16: return update_slot<recap::BFloat16>(values, slot, grad, kAll);
    case recap::Dtype::float16: return update_slot<recap::Float16>(values, slot, grad, kAll);
  }
}

void run(const recap::Plan& plan, const recap::Step& step) {
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    if (!step.grads[i]) continue;
    update(step.values[step.values_of_slot[i]], plan.slots[i], step.grads[i]);
  }
}

}  // namespace scalar
