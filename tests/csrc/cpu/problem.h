// A plan with its memory: slots of any update, type, size and alignment, filled with numbers.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/engine.h"
#include "guarded.h"
#include "numerics/storage.h"
#include "plan/plan.h"
#include "plan/step.h"

using recap::Dtype;
using recap::Update;

constexpr int kArrays = 2 + recap::kMaxStates;  // param, grad, states

struct SlotShape {
  Update update;
  Dtype dtype;
  int64_t size;
  bool has_grad = true;
  int shift = 0;  // elements by which its arrays are misaligned, each differently
};

enum class Numbers {
  ordinary,  // between -2 and 2; second moments and sums are not negative
  any,       // any bit pattern: NaN, infinities and subnormal numbers too
};

inline int states_of(Update update) {
#define RECAP_STATES_OF(name, ...) recap::UpdateType<Update::name>::type::kStates,
  constexpr int kStates[] = {RECAP_ELEMENT_UPDATES(RECAP_STATES_OF)};
#undef RECAP_STATES_OF
  return kStates[static_cast<int>(update)];
}

// `slow`: averages that move by less than half of the way, so that lerps start from their old
// value.
inline recap::Hyper hyper_for(Update update, bool slow) {
  const double beta = slow ? 0.9 : 0.3;
  recap::Hyper hyper;
  hyper.lr = 0.1;
  const auto adam = [&](double weight_decay, bool amsgrad) {
    hyper.algorithm = recap::Algorithm::adam;
    hyper.adam = {beta, beta, 1e-8, weight_decay, amsgrad, false, false};
  };
  const auto adagrad = [&](double weight_decay) {
    hyper.algorithm = recap::Algorithm::adagrad;
    hyper.adagrad = {0.01, 1e-10, weight_decay};
  };
  const auto sgd = [&](double weight_decay, double momentum, bool nesterov) {
    hyper.algorithm = recap::Algorithm::sgd;
    hyper.sgd = {momentum, 0.25, weight_decay, nesterov};
  };
  const auto rmsprop = [&](double momentum, bool centered) {
    hyper.algorithm = recap::Algorithm::rmsprop;
    hyper.rmsprop = {beta, 1e-8, slow ? 0.125 : 0.0, momentum, centered};
  };
  constexpr double kDecay = 0.125;
  switch (update) {
    case Update::adam: adam(0, false); break;
    case Update::adam_l2: adam(kDecay, false); break;
    case Update::adam_amsgrad: adam(0, true); break;
    case Update::adam_amsgrad_l2: adam(kDecay, true); break;
    case Update::adagrad: adagrad(0); break;
    case Update::adagrad_l2: adagrad(kDecay); break;
    case Update::sgd: sgd(0, 0, false); break;
    case Update::sgd_l2: sgd(kDecay, 0, false); break;
    case Update::sgd_momentum: sgd(0, beta, false); break;
    case Update::sgd_momentum_l2: sgd(kDecay, beta, false); break;
    case Update::sgd_nesterov: sgd(0, beta, true); break;
    case Update::sgd_nesterov_l2: sgd(kDecay, beta, true); break;
    case Update::lion:
      hyper.algorithm = recap::Algorithm::lion;
      hyper.lion = {beta, slow ? 0.8 : 0.2, kDecay};
      break;
    case Update::rmsprop: rmsprop(0, false); break;
    case Update::rmsprop_momentum: rmsprop(0.7, false); break;
    case Update::rmsprop_centered: rmsprop(0, true); break;
    case Update::rmsprop_centered_momentum: rmsprop(0.7, true); break;
    case Update::rowwise_adagrad:
    case Update::rowwise_adagrad_l2: break;  // of rows
  }
  return hyper;
}

// The first of the arrays that a root is taken of, as states are numbered; no state: -1.
inline int first_squares(Update update) {
  switch (hyper_for(update, true).algorithm) {
    case recap::Algorithm::adam: return 1;
    case recap::Algorithm::adagrad:
    case recap::Algorithm::rmsprop: return 0;
    default: return -1;
  }
}

// Slots of all kinds and sizes, some without a gradient; enough work for many threads.
inline std::vector<SlotShape> mixed_shapes() {
  std::vector<SlotShape> shapes;
  std::mt19937 random(5);
  for (int i = 0; i < 60; ++i) {
    const int64_t size = i % 10 == 0 ? 5 * recap::cpu::kTileSize + random() % recap::cpu::kTileSize
                                     : random() % 2000;
    shapes.push_back({static_cast<Update>(random() % recap::kUpdates),
                      static_cast<Dtype>(random() % recap::kDtypes), size, random() % 5 != 0,
                      static_cast<int>(random() % 4)});
  }
  shapes.push_back({Update::adam, Dtype::float32, 9 * recap::cpu::kTileSize + 1, false});
  shapes.push_back({Update::adam, Dtype::float32, 20 * recap::cpu::kTileSize + 3});
  return shapes;
}

// Two problems of the same shapes, numbers and seed hold the same bits.
class Problem {
 public:
  recap::Plan plan;
  recap::Step step;

  Problem(const std::vector<SlotShape>& shapes, Numbers numbers, bool slow = true,
          uint32_t seed = 1)
      : shapes_(shapes), random_(seed) {
    for (const SlotShape& shape : shapes) add(shape, numbers, slow);
    plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
  }

  const SlotShape& shape(size_t slot) const { return shapes_[slot]; }

  // Array 0 of a slot is the parameter, 1 the gradient, the rest are states; null if it has none.
  Guarded* array(size_t slot, int index) { return arrays_[slot * kArrays + index].get(); }

  // Sets one element of an array that the slot has, rounded to the slot's type.
  void set(size_t slot, int index, int64_t element, double value) {
    const Dtype dtype = shapes_[slot].dtype;
    write(array(slot, index)->data() + element * recap::dtype_size(dtype), dtype, value);
  }

  bool guards_intact() {
    for (const auto& array : arrays_) {
      if (array && !array->intact()) return false;
    }
    return true;
  }

 private:
  void add(const SlotShape& shape, Numbers numbers, bool slow) {
    recap::Slot slot;
    slot.size = shape.size;
    slot.dtype = shape.dtype;
    const int used = 2 + states_of(shape.update);
    for (int index = 0; index < kArrays; ++index) {
      arrays_.emplace_back(index < used ? make_array(shape, index, numbers) : nullptr);
      void* data = index < used ? arrays_.back()->data() : nullptr;
      if (index == 0) slot.param = data;
      if (index == 1) step.grads.push_back(shape.has_grad ? data : nullptr);
      if (index >= 2) slot.state[index - 2] = data;
    }
    plan.slots.push_back(slot);
    step.values_of_slot.push_back(static_cast<uint32_t>(step.values.size()));
    step.values.push_back(recap::make_values(hyper_for(shape.update, slow), 3, false, 3));
  }

  std::unique_ptr<Guarded> make_array(const SlotShape& shape, int index, Numbers numbers) {
    const size_t element = recap::dtype_size(shape.dtype);
    auto array =
        std::make_unique<Guarded>(shape.size * element, (shape.shift + index) % 4 * element);
    const int squares = first_squares(shape.update);
    const bool is_adam = squares == 1;  // of which all from there on are
    const bool not_negative =
        squares >= 0 && (is_adam ? index >= 2 + squares : index == 2 + squares);
    for (int64_t i = 0; i < shape.size; ++i) {
      double value = static_cast<double>(static_cast<int64_t>(random_())) * 0x1p-62;
      if (not_negative) value = std::fabs(value);
      write(array->data() + i * element, shape.dtype, value);
      if (numbers == Numbers::any && random_() % 4) {
        const uint64_t bits = random_();
        memcpy(array->data() + i * element, &bits, element);
      }
    }
    return array;
  }

  static void write(unsigned char* to, Dtype dtype, double value) {
    const float narrow = static_cast<float>(value);
    recap::BFloat16 bfloat16;
    recap::Float16 float16;
    recap::store(narrow, bfloat16);
    recap::store(narrow, float16);
    switch (dtype) {
      case Dtype::float64: memcpy(to, &value, sizeof value); break;
      case Dtype::float32: memcpy(to, &narrow, sizeof narrow); break;
      case Dtype::bfloat16: memcpy(to, &bfloat16, sizeof bfloat16); break;
      case Dtype::float16: memcpy(to, &float16, sizeof float16); break;
    }
  }

  std::vector<SlotShape> shapes_;
  std::vector<std::unique_ptr<Guarded>> arrays_;
  std::mt19937_64 random_;
};
