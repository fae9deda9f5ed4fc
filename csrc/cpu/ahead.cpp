#include "ahead.h"

namespace recap::cpu {

constexpr int kBlocksAhead = 8;

Ahead::Ahead(const Plan& plan, const Step& step, size_t begin, size_t end)
    : plan_(plan), step_(step), tile_(begin), end_(end) {
  for (int block = 0; block < kBlocksAhead; ++block) next_block();
}

Ahead Ahead::none() {
  static const Plan plan;
  static const Step step;
  return Ahead(plan, step, 0, 0);
}

bool Ahead::next_tile() {
  const auto is_left_out = [this](uint32_t slot) {
    return !step_.grads[slot] || plan_.slots[slot].row_size;
  };
  while (tile_ < end_ && is_left_out(plan_.tiles[tile_].slot)) {
    tile_ += tiles_left(plan_.slots[plan_.tiles[tile_].slot], plan_.tiles[tile_]);
  }
  if (tile_ >= end_) return false;
  const Tile& tile = plan_.tiles[tile_++];
  const Slot& slot = plan_.slots[tile.slot];
  const int64_t offset = tile.begin * dtype_size(slot.dtype);
  left_ = tile.size * dtype_size(slot.dtype);
  grad_ = static_cast<const char*>(step_.grads[tile.slot]) + offset;
  written_count_ = 0;
  written_[written_count_++] = static_cast<const char*>(slot.param) + offset;
  for (const void* state : slot.state) {
    if (state) written_[written_count_++] = static_cast<const char*>(state) + offset;
  }
  return true;
}

}  // namespace recap::cpu
