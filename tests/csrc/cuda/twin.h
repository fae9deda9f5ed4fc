// One set of tensors twice, with the same bits at the same alignment: for the CPU engine and for
// the CUDA engine.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cpu/engine.h"
#include "cpu/guarded.h"
#include "cpu/problem.h"
#include "cuda/engine.h"
#include "numerics/codes.h"

inline std::vector<Update> all_updates() {
  std::vector<Update> updates;
  for (int i = 0; i < recap::kUpdates; ++i) updates.push_back(static_cast<Update>(i));
  return updates;
}

inline std::vector<Dtype> all_dtypes() {
  return {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
}

// And the rest of a parameter in two arrays, and the scales of states.
constexpr int kScales = kArrays + 1, kTwinArrays = kScales + recap::kMaxStates;

struct Tensor {
  Update update = Update::adam;
  Dtype dtype = Dtype::float32;
  int64_t size = 1;
  bool has_grad = true;
  std::array<int, kTwinArrays> shift = {};  // by how many elements each array is misaligned
  int step = 3;  // tensors with the same update and step share their values
  std::optional<recap::Format> format = {};

  Dtype dtype_of(size_t array) const {
    if (!format || array == 0) return dtype;
    if (array >= kScales) return Dtype::float32;
    return array == 1 ? format->grad : array == kArrays ? rest_dtype(*format) : format->state;
  }
  bool has_codes(size_t array) const {
    return format && format->has_codes && array >= 2 && array < kArrays;
  }
  int64_t width_of(size_t array) const {
    return has_codes(array) ? 1 : recap::dtype_size(dtype_of(array));
  }
  int64_t count_of(size_t array) const {
    constexpr int kBlock = recap::kElementsOfScale;
    return array < kScales ? size : (size + kBlock - 1) / kBlock;
  }
  bool has_rest() const {
    return format && (format->param == recap::ParamRounding::remainder ||
                      format->param == recap::ParamRounding::master);
  }
  bool uses(int array) const {
    if (array >= kScales) return has_codes(array - kScales + 2) && uses(array - kScales + 2);
    return array == kArrays ? has_rest() : array < 2 + states_of(update);
  }
};

// Any format, of which there are some for each dtype but float64.
inline void give_format(Tensor& tensor, std::mt19937& random) {
  constexpr Dtype kStored[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  tensor.dtype = kStored[random() % 3];
  recap::Format format;
  format.grad = kStored[random() % 3];
  format.state = kStored[random() % 3];
  format.draws_for_states = format.state != Dtype::float32 && random() % 2;
  format.has_codes = format.state == Dtype::float32 && random() % 2;
  format.draws_for_states |= format.has_codes;
  format.seed = random();
  format.first_element = random() % 3 ? 0 : random() % 1000;
  if (tensor.dtype != Dtype::float32) {
    const auto own = tensor.dtype == Dtype::bfloat16 ? recap::ParamRounding::remainder
                                                     : recap::ParamRounding::master;
    const recap::ParamRounding all[] = {recap::ParamRounding::nearest,
                                        recap::ParamRounding::stochastic, own};
    format.param = all[random() % 3];
  }
  tensor.format = format;
}

// 40 tensors of any update, dtype, alignment and size, with steps from `step()`.
template <typename Step>
std::vector<Tensor> random_tensors(std::mt19937& random, Step&& step) {
  std::vector<Tensor> tensors;
  for (int i = 0; i < 40; ++i) {
    Tensor tensor;
    tensor.update = all_updates()[random() % recap::kUpdates];
    tensor.dtype = all_dtypes()[random() % recap::kDtypes];
    tensor.size = i % 10 ? random() % 700 : random() % (3 * recap::cuda::kTileSize);
    tensor.has_grad = random() % 5 != 0;
    tensor.step = static_cast<int>(step());
    if (random() % 3 == 0) give_format(tensor, random);
    if (random() % 2) {
      for (int& shift : tensor.shift) shift = random() % 4;
    }
    tensors.push_back(tensor);
  }
  return tensors;
}

class Twin {
 public:
  struct Side {
    recap::Plan plan;
    recap::Step step;
    std::vector<std::unique_ptr<Guarded>>
        arrays;  // kTwinArrays per slot: param, grad, states, rest
    std::vector<std::unique_ptr<recap::Format>> formats;
  };
  Side cpu, cuda;

  explicit Twin(const std::vector<Tensor>& tensors, uint32_t seed = 1)
      : tensors_(tensors), random_(seed) {
    for (const Tensor& tensor : tensors) {
      add_values(tensor);
      add_slot(tensor, cpu);
      add_slot(tensor, cuda);
      fill(tensor);
    }
    cpu.plan.tiles = recap::cut_tiles(cpu.plan.slots, recap::cpu::kTileSize);
    cuda.plan.tiles = recap::cut_tiles(cuda.plan.slots, recap::cuda::kTileSize);
  }

  void run_cpu() {
    const auto run = [](int count, void (*task)(int, void*), void* context) {
      for (int i = 0; i < count; ++i) task(i, context);
    };
    recap::cpu::run(cpu.plan, cpu.step, {1, run});
  }

  // Where both sides differ first, or an empty string. A NaN equals any other.
  std::string difference() {
    for (size_t i = 0; i < cpu.arrays.size(); ++i) {
      if (!cpu.arrays[i]) continue;
      const Tensor& tensor = tensors_[i / kTwinArrays];
      if (!cuda.arrays[i]->intact()) return name(i) + " was written beyond its end";
      const Dtype dtype = tensor.dtype_of(i % kTwinArrays);
      const size_t array = i % kTwinArrays;
      const int64_t element = tensor.width_of(array);
      for (int64_t at = 0; at < tensor.count_of(array); ++at) {
        const unsigned char* expected = cpu.arrays[i]->data() + at * element;
        const unsigned char* found = cuda.arrays[i]->data() + at * element;
        if (std::memcmp(expected, found, element) &&
            (tensor.has_codes(array) || !(is_nan(expected, dtype) && is_nan(found, dtype)))) {
          return name(i) + " differs at element " + std::to_string(at);
        }
      }
    }
    return "";
  }

  std::string name(size_t array) const {
    const Tensor& tensor = tensors_[array / kTwinArrays];
    return "array " + std::to_string(array % kTwinArrays) + " of slot " +
           std::to_string(array / kTwinArrays) + " (update " +
           std::to_string(static_cast<int>(tensor.update)) + ", dtype " +
           std::to_string(static_cast<int>(tensor.dtype)) + ", " + std::to_string(tensor.size) +
           " elements)";
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }

  Guarded& gradient(size_t slot) { return *cuda.arrays[slot * kTwinArrays + 1]; }

  // The first slot whose gradient is not zero, if `clears(slot)` and it has one, or else is not
  // that of `before`; -1: none.
  template <typename Clears>
  int wrong_gradient(const Clears& clears, Twin& before) {
    for (size_t slot = 0; slot < tensors_.size(); ++slot) {
      const bool cleared = tensors_[slot].has_grad && clears(slot);
      const unsigned char* const found = gradient(slot).data();
      for (size_t i = 0; i < gradient(slot).size(); ++i) {
        if (found[i] != (cleared ? 0 : before.gradient(slot).data()[i])) return slot;
      }
    }
    return -1;
  }

  // The emulated machine counts stores to the CUDA side's arrays from now on.
  void watch() {
    auto& watched = emulation::machine().watched;
    watched.clear();
    for (const auto& array : cuda.arrays) {
      if (array && array->size()) {
        watched[array->data()] = {array->size(), std::vector<uint8_t>(array->size())};
      }
    }
  }

  // Where a parameter or state of a slot with a gradient was not stored `times` times, or anything
  // else was at all; an empty string if nowhere.
  std::string wrong_stores(int times) const {
    for (size_t i = 0; i < cuda.arrays.size(); ++i) {
      const auto& array = cuda.arrays[i];
      if (!array || !array->size()) continue;
      const bool written = tensors_[i / kTwinArrays].has_grad && i % kTwinArrays != 1;
      for (const int stores : emulation::machine().watched.at(array->data()).stores) {
        if (stores != (written ? times : 0)) {
          return name(i) + " was stored " + std::to_string(stores) + " times";
        }
      }
    }
    return "";
  }

 private:
  void add_values(const Tensor& tensor) {
    const auto key = std::make_pair(tensor.update, tensor.step);
    const auto [entry, added] =
        entries_.emplace(key, static_cast<uint32_t>(cpu.step.values.size()));
    for (Side* side : {&cpu, &cuda}) {
      side->step.values_of_slot.push_back(entry->second);
      if (added) {
        const recap::Hyper hyper = hyper_for(tensor.update, tensor.step % 2 != 0);
        side->step.values.push_back(recap::make_values(hyper, tensor.step, false, 3));
      }
    }
  }

  static void add_slot(const Tensor& tensor, Side& side) {
    recap::Slot slot;
    slot.size = tensor.size;
    slot.dtype = tensor.dtype;
    if (tensor.format) {
      side.formats.push_back(std::make_unique<recap::Format>(*tensor.format));
      slot.format = side.formats.back().get();
    }
    for (int index = 0; index < kTwinArrays; ++index) {
      const int64_t element = tensor.width_of(index), count = tensor.count_of(index);
      const bool used = tensor.uses(index);
      side.arrays.push_back(
          used ? std::make_unique<Guarded>(count * element, tensor.shift[index] * element)
               : nullptr);
      void* data = used ? side.arrays.back()->data() : nullptr;
      if (index == 0) slot.param = data;
      if (index == 1) side.step.grads.push_back(tensor.has_grad ? data : nullptr);
      if (index >= 2 && index < kArrays) slot.state[index - 2] = data;
      if (index == kArrays && used) side.formats.back()->rest = data;
      if (index >= kScales && used) side.formats.back()->scale[index - kScales] = data;
    }
    side.plan.slots.push_back(slot);
  }

  void fill(const Tensor& tensor) {
    for (size_t i = cpu.arrays.size() - kTwinArrays; i < cpu.arrays.size(); ++i) {
      if (!cpu.arrays[i]) continue;
      const Dtype dtype = tensor.dtype_of(i % kTwinArrays);
      const size_t array = i % kTwinArrays;
      const int64_t element = tensor.width_of(array);
      for (int64_t at = 0; at < tensor.count_of(array); ++at) {
        unsigned char* to = cpu.arrays[i]->data() + at * element;
        if (tensor.has_codes(array)) {
          *to = static_cast<unsigned char>(random_());
        } else {
          write_number(to, dtype, array >= 2);
        }
        std::memcpy(cuda.arrays[i]->data() + at * element, to, element);
      }
    }
  }

  // Mostly ordinary, now and then as large or as small as the type allows.
  void write_number(unsigned char* to, Dtype dtype, bool not_negative) {
    double value = static_cast<double>(static_cast<int64_t>(random_())) * 0x1p-62;
    switch (random_() % 64) {
      case 0: value = 0.0; break;
      case 1: value *= 0x1p-130; break;
      case 2: value *= 0x1p-20; break;
      case 3: value *= 0x1p13; break;
      case 4: value *= 0x1p125; break;
    }
    if (not_negative) value = std::fabs(value);
    const float narrow = static_cast<float>(value);
    const auto put = [to](const auto& stored) { std::memcpy(to, &stored, sizeof stored); };
    recap::BFloat16 bfloat16;
    recap::Float16 float16;
    switch (dtype) {
      case Dtype::float64: return put(value);
      case Dtype::float32: return put(narrow);
      case Dtype::bfloat16: return recap::store(narrow, bfloat16), put(bfloat16);
      case Dtype::float16: return recap::store(narrow, float16), put(float16);
    }
  }

  static bool is_nan(const unsigned char* from, Dtype dtype) {
    const auto test = [from](auto stored) {
      std::memcpy(&stored, from, sizeof stored);
      return std::isnan(recap::load(stored));
    };
    switch (dtype) {
      case Dtype::float64: return test(double());
      case Dtype::float32: return test(float());
      case Dtype::bfloat16: return test(recap::BFloat16());
      case Dtype::float16: return test(recap::Float16());
    }
    return false;
  }

  std::vector<Tensor> tensors_;
  std::map<std::pair<Update, int>, uint32_t> entries_;
  std::mt19937_64 random_;
};
