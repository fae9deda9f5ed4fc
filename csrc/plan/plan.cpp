#include "plan.h"

#include <algorithm>

namespace recap {

std::vector<Tile> cut_tiles(const std::vector<Slot>& slots, int64_t tile_size) {
  std::vector<Tile> tiles;
  for (uint32_t slot = 0; slot < slots.size(); ++slot) {
    for (int64_t begin = 0; begin < slots[slot].size; begin += tile_size) {
      tiles.push_back({slot, begin, std::min(tile_size, slots[slot].size - begin)});
    }
  }
  return tiles;
}

}  // namespace recap
