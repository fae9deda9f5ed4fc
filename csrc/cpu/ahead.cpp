#include "ahead.h"

namespace recap::cpu {

constexpr int kBlocksAhead = 8;

Ahead::Ahead(const Plan& plan, const Step& step, size_t begin, size_t end)
    : plan_(plan), step_(step), tile_(begin), end_(end) {
  for (int block = 0; block < kBlocksAhead; ++block) next_block();
}

bool Ahead::next_tile() {
  while (tile_ < end_ && !step_.grads[plan_.tiles[tile_].slot]) ++tile_;
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
