// Tiles: every element of every slot in exactly one.
#include <random>

#include "check.h"
#include "plan/plan.h"

namespace {

using recap::Slot;
using recap::Tile;

Slot slot_of(int64_t size) {
  Slot slot;
  slot.size = size;
  return slot;
}

void check_cover(const std::vector<int64_t>& sizes, int64_t tile_size) {
  std::vector<Slot> slots;
  std::vector<std::vector<int>> visits;
  for (const int64_t size : sizes) {
    slots.push_back(slot_of(size));
    visits.emplace_back(size, 0);
  }
  std::vector<Tile> tiles = recap::cut_tiles(slots, tile_size);
  uint32_t last_slot = 0;
  for (const Tile& tile : tiles) {
    CHECK(tile.size > 0 && tile.size <= tile_size, "tile of ", tile.size);
    CHECK(tile.slot >= last_slot, "slot ", tile.slot, " after ", last_slot);
    last_slot = tile.slot;
    for (int64_t i = tile.begin; i < tile.begin + tile.size; ++i) ++visits.at(tile.slot).at(i);
  }
  size_t fewest = 0;
  for (size_t slot = 0; slot < sizes.size(); ++slot) {
    for (size_t i = 0; i < visits[slot].size(); ++i) {
      CHECK_EQ(visits[slot][i], 1, "element ", i, " of slot ", slot, " with ", sizes[slot]);
    }
    fewest += (sizes[slot] + tile_size - 1) / tile_size;
  }
  CHECK_EQ(tiles.size(), fewest);
}

TEST(no_slots_have_no_tiles) { check_cover({}, 8); }

TEST(sizes_around_the_tile_are_covered_once) {
  for (const int64_t tile : {1, 2, 7, 64, 1000}) {
    const std::vector<int64_t> sizes = {0, 1, tile - 1, tile, tile + 1, 3 * tile + 7, 0};
    check_cover(sizes, tile);
    for (const int64_t size : sizes) check_cover({size}, tile);
  }
}

TEST(tiles_of_rows_have_whole_rows) {
  for (const int64_t row : {1, 3, 8, 9, 100}) {
    for (const int64_t rows : {0, 1, 2, 50}) {
      Slot slot = slot_of(rows * row);
      slot.row_size = row;
      int64_t end = 0;
      for (const Tile& tile : recap::cut_tiles({slot}, 8)) {
        CHECK_EQ(tile.begin, end);
        CHECK(tile.size > 0 && tile.size % row == 0, "a tile of ", tile.size, " of rows of ", row);
        CHECK(tile.size <= 8 || tile.size == row, "a tile of ", tile.size, " of rows of ", row);
        end += tile.size;
      }
      CHECK_EQ(end, slot.size);
    }
  }
}

TEST(random_sizes_are_covered_once) {
  std::mt19937 random(1);
  for (int run = 0; run < 200; ++run) {
    std::vector<int64_t> sizes(random() % 20);
    for (int64_t& size : sizes) size = random() % 500;
    check_cover(sizes, 1 + random() % 100);
  }
}

TEST(offsets_do_not_wrap_at_32_bits) {
  constexpr int64_t kTile = int64_t{1} << 28, kSize = (int64_t{1} << 33) + 5;
  const std::vector<Tile> tiles = recap::cut_tiles({slot_of(3), slot_of(kSize)}, kTile);
  CHECK_EQ(tiles.size(), 34u);
  for (size_t i = 1; i < tiles.size(); ++i) {
    CHECK_EQ(tiles[i].slot, 1u);
    CHECK_EQ(tiles[i].begin, static_cast<int64_t>(i - 1) * kTile);
    CHECK_EQ(tiles[i].size, i == 33 ? 5 : kTile);
  }
}

TEST(dtypes_have_their_sizes) {
  CHECK_EQ(recap::dtype_size(recap::Dtype::float32), 4);
  CHECK_EQ(recap::dtype_size(recap::Dtype::float64), 8);
  CHECK_EQ(recap::dtype_size(recap::Dtype::bfloat16), 2);
  CHECK_EQ(recap::dtype_size(recap::Dtype::float16), 2);
}

}  // namespace
