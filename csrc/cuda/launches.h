// Splits a step into launches and writes their arguments. Host code without CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan/step.h"
#include "launch_arguments.h"

namespace recap::cuda {

// The device table of `plan`. Throws std::invalid_argument unless the tiles are in slot order and
// none is larger than kTileSize.
std::vector<TileEntry> make_tile_table(const Plan& plan);

class Launches {
 public:
  explicit Launches(const Plan& plan);

  // Finds the first launch of `step`, then the next, of as many slots as fit; false: there is none.
  bool first(const Step& step);
  bool next(const Step& step);

  // The launch found: its first tile, its tiles, and the size of its arguments in bytes.
  uint32_t first_tile() const { return first_tile_of_slot_[begin_]; }
  uint32_t tiles() const { return first_tile_of_slot_[end_] - first_tile(); }
  size_t argument_bytes() const { return argument_bytes(end_ - begin_, entries_.size(), float64_); }

  // Writes them to `out`, which is aligned to 8 bytes; `tiles` is the device table.
  void write(const Step& step, const TileEntry* tiles, unsigned char* out) const;

 private:
  static size_t argument_bytes(size_t slots, size_t entries, bool float64);
  bool is_active(const Step& step, uint32_t slot) const;
  bool accept(const Step& step, uint32_t slot);  // false: the slot does not fit any more

  std::vector<char> is_float64_;              // per slot
  std::vector<uint32_t> first_tile_of_slot_;  // and the number of tiles at the end
  uint32_t slots_;

  // The launch: the slots [begin_, end_). Each entry is an index into step.values, of which
  // entry_of_ is the inverse.
  uint32_t begin_ = 0, end_ = 0;
  bool float64_ = false;
  std::vector<uint32_t> entries_;
  std::vector<uint16_t> entry_of_;
};

}  // namespace recap::cuda
