#include "prefetch.h"

#include <algorithm>

namespace recap::cpu {

Prefetch::Prefetch(const Plan& plan, const Step& step, size_t begin, size_t end, int level)
    : plan_(plan), step_(step), tile_(begin), end_(end), level_(level) {
  for (int block = 0; block < kLead; ++block) next_block();
}

Prefetch Prefetch::none() {
  static const Plan plan;
  static const Step step;
  return Prefetch(plan, step, 0, 0, 1);
}

bool Prefetch::next_tile() {
  while (tile_ < end_) {
    const Tile& tile = plan_.tiles[tile_];
    const Slot& slot = plan_.slots[tile.slot];
    const void* const grad = step_.grads[tile.slot];
    if (!grad || slot.row_size) {
      tile_ += tiles_left(slot, tile);
      continue;
    }
    ++tile_;
    const int64_t item_size = dtype_size(slot.dtype);
    left_ = tile.size * item_size;
    if (is_long(slot)) {
      tile_ += tiles_left(slot, tile) - 1;
      left_ = std::min((slot.size - tile.begin) * item_size, kLead * kBlockBytes);
    }
    const int64_t of_grad = dtype_size(grad_dtype(slot)), of_state = state_size(slot);
    grad_ = static_cast<const char*>(grad) + tile.begin * of_grad;
    int count = 0;
    written_[count++] = static_cast<const char*>(element(slot.param, slot.dtype, tile.begin));
    for (const void* state : slot.state) {
      if (state) written_[count++] = static_cast<const char*>(state) + tile.begin * of_state;
    }
    written_count_ = count;
    return true;
  }
  return false;
}

}  // namespace recap::cpu
