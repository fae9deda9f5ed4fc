// A plan: every slot of every group, cut into tiles. It holds addresses and sizes only; an engine
// needs nothing else to run a step, and nothing here knows of torch or of a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../algorithms/updates.h"
#include "format.h"

namespace recap {

// One parameter tensor with its state tensors: dense memory, visited in memory order.
struct Slot {
  void* param = nullptr;
  void* state[kMaxStates] = {};  // row-wise Adagrad's has one number per row, float or double
  int64_t size = 0;              // elements
  int64_t row_size = 0;  // elements of a row, if rows are updated as a whole or left alone; else 0
  Dtype dtype = Dtype::float32;
  const Format* format = nullptr;  // null: all arrays are of `dtype`, rounded to nearest
};

RECAP_INLINE Dtype grad_dtype(const Slot& slot) {
  return slot.format ? slot.format->grad : slot.dtype;
}

// Bytes of an element of a state.
RECAP_INLINE int64_t state_size(const Slot& slot) {
  return slot.format ? state_size(*slot.format) : dtype_size(slot.dtype);
}

// A run of consecutive elements of one slot.
struct Tile {
  uint32_t slot;
  int64_t begin;  // first element
  int64_t size;   // elements
};

// How many tiles of its slot are left, this one included: to go past a slot without a gradient at
// once, however large it is.
RECAP_INLINE size_t tiles_left(const Slot& slot, const Tile& tile) {
  const int64_t left = slot.size - tile.begin;
  return left == tile.size ? 1 : static_cast<size_t>((left + tile.size - 1) / tile.size);
}

struct Plan {
  std::vector<Slot> slots;
  std::vector<Tile> tiles;
};

// Cuts every slot into tiles of at most `tile_size` elements, in slot order. Where rows are updated
// as a whole a tile has whole rows, and at least one.
std::vector<Tile> cut_tiles(const std::vector<Slot>& slots, int64_t tile_size);

}  // namespace recap
