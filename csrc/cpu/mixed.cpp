#include "mixed.h"

#include <algorithm>
#include <cstring>

#include "../numerics/codes.h"

namespace recap::cpu {
namespace {

class MixedSlot {
 public:
  MixedSlot(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad)
      : kernel_(kernels.mixed_of[static_cast<int>(values.update)]),
        slot_(slot),
        format_(*slot.format),
        values_(values),
        grad_(grad),
        key_(rounding_key(format_.seed, values.step)) {}

  void update(int64_t begin, int64_t size) const {
    MixedArrays all;
    all.arrays.param = element(slot_.param, slot_.dtype, begin);
    all.arrays.grad = element(grad_, format_.grad, begin);
    for (int k = 0; k < kMaxStates; ++k) {
      char* const state = static_cast<char*>(slot_.state[k]);
      all.arrays.state[k] = state ? state + begin * state_size(format_) : nullptr;
      float* const scale = static_cast<float*>(format_.scale[k]);
      all.scale[k] = scale ? scale + begin / kElementsOfScale : nullptr;
    }
    all.arrays.size = size;
    all.rest = format_.rest ? element(format_.rest, rest_dtype(format_), begin) : nullptr;
    all.dtype = slot_.dtype;
    all.format = &format_;
    all.index = static_cast<uint64_t>(format_.first_element + begin);
    all.key = key_;
    kernel_(values_, all);
    if (values_.clears_grads) {
      std::memset(const_cast<void*>(all.arrays.grad), 0, size * dtype_size(format_.grad));
    }
  }

  void ask_ahead(int64_t begin) const {
    ask(grad_, dtype_size(format_.grad), begin, false);
    ask(slot_.param, dtype_size(slot_.dtype), begin, true);
    for (const void* state : slot_.state) {
      if (state) ask(state, state_size(format_), begin, true);
    }
  }

 private:
  static void ask(const void* array, int64_t width, int64_t begin, bool is_written) {
    const auto* const first = static_cast<const char*>(array) + begin * width;
    for (int64_t byte = 0; byte < kPiece * width; byte += 64) {
      if (is_written) {
        __builtin_prefetch(first + byte, 1);
      } else {
        __builtin_prefetch(first + byte);
      }
    }
  }

  const MixedKernel kernel_;
  const Slot& slot_;
  const Format& format_;
  const Values& values_;
  const void* const grad_;
  const uint64_t key_;
};

}  // namespace

void update_mixed(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                  int64_t begin, int64_t size, Prefetch& prefetch) {
  const MixedSlot mixed(kernels, slot, values, grad);
  const int64_t block = kBlockBytes / dtype_size(slot.dtype);
  for (int64_t done = 0; done < size; done += kPiece) {
    const int64_t count = std::min(size - done, kPiece);
    for (int64_t asked = 0; asked < count; asked += block) prefetch.next_block();
    mixed.update(begin + done, count);
  }
}

void update_middle_of_mixed(const Kernels& kernels, const Slot& slot, const Values& values,
                            const void* grad, int64_t begin, int64_t size, Way way) {
  const MixedSlot mixed(kernels, slot, values, grad);
  const int64_t ahead = way.ahead * kBlockBytes / dtype_size(slot.dtype);
  const int64_t part = size / way.streams / kPiece * kPiece;
  const int64_t end = part * way.streams;
  for (int64_t turn = 0; turn < part; turn += kPiece) {
    for (int64_t first = turn; first < end; first += part) {
      if (ahead) mixed.ask_ahead(begin + first + ahead);
      mixed.update(begin + first, kPiece);
    }
  }
  for (int64_t first = end; first < size; first += kPiece) {
    mixed.update(begin + first, std::min(size - first, kPiece));
  }
}

}  // namespace recap::cpu
