#include "plan.h"

#include <algorithm>

namespace recap {

std::vector<Tile> cut_tiles(const std::vector<Slot>& slots, int64_t tile_size) {
  std::vector<Tile> tiles;
  for (uint32_t slot = 0; slot < slots.size(); ++slot) {
    const int64_t row = slots[slot].row_size;
    const int64_t most = row ? std::max(tile_size / row, int64_t{1}) * row : tile_size;
    for (int64_t begin = 0; begin < slots[slot].size; begin += most) {
      tiles.push_back({slot, begin, std::min(most, slots[slot].size - begin)});
    }
  }
  return tiles;
}

}  // namespace recap
