// Splits a step into launches and writes their arguments. Host code without CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan/step.h"
#include "launch_arguments.h"

namespace recap::cuda {

// What an engine keeps on its device, formats right behind tiles.
struct DeviceTable {
  std::vector<TileEntry> tiles;
  std::vector<FormatEntry> formats;
};

// That of `plan`. Throws std::invalid_argument unless the tiles are in slot order and none is
// larger than kTileSize.
DeviceTable make_device_table(const Plan& plan);

class Launches {
 public:
  explicit Launches(const Plan& plan);

  // Finds the first launch of `step`, then the next, of as many slots as fit; false: there is none.
  bool first(const Step& step) { return first(demand(step)); }
  bool first(const DeviceStep& step) { return first(demand(step)); }
  bool next(const Step& step) { return next(demand(step)); }
  bool next(const DeviceStep& step) { return next(demand(step)); }

  // The launch found: its first tile, its tiles, its blocks, and the size of its arguments in
  // bytes.
  uint32_t first_tile() const { return first_tile_of_slot_[begin_]; }
  uint32_t tiles() const { return first_tile_of_slot_[end_] - first_tile(); }
  uint32_t blocks() const { return tiles() ? tiles() : 1; }
  size_t argument_bytes() const { return argument_bytes_; }

  // Writes them to `out`, which is aligned to 8 bytes; `tiles` begins the device table, and
  // `ticket` a number in device memory.
  void write(const Step& step, const TileEntry* tiles, unsigned char* out) const;
  void write(const DeviceStep& step, const TileEntry* tiles, uint32_t* ticket,
             unsigned char* out) const;

 private:
  // What a step asks of its launches. An entry is what slots share: a set of values, or a group.
  struct Demand {
    const std::vector<const void*>& grads;
    const std::vector<uint32_t>& entry_of_slot;
    size_t entries;
    size_t header_bytes, entry_bytes;
    size_t float64_bytes;  // more per entry if a slot is float64
    size_t step_bytes;     // or if one draws
    bool counts;           // slots without elements take part
    bool always;           // without any slot there is a launch, too
  };
  static Demand demand(const Step& step);
  static Demand demand(const DeviceStep& step);

  bool first(const Demand& demand);
  bool next(const Demand& demand);
  bool is_active(const Demand& demand, uint32_t slot) const;
  uint32_t next_active(const Demand& demand, uint32_t slot) const;  // `slot` or a later one
  bool accept(const Demand& demand, uint32_t slot);  // false: the slot does not fit any more
  const FormatEntry* formats_behind(const TileEntry* tiles) const;
  void write_grads(const std::vector<const void*>& grads,
                   const std::vector<uint32_t>& entry_of_slot, unsigned char* out) const;

  std::vector<char> is_float64_, draws_;      // per slot
  std::vector<uint32_t> first_tile_of_slot_;  // and the number of tiles at the end
  uint32_t slots_;

  // The launch: the slots [begin_, end_). Each entry is an index into the step's, of which
  // entry_of_ is the inverse.
  uint32_t begin_ = 0, end_ = 0;
  uint32_t next_begin_ = 0;  // slots_: it is the last
  size_t argument_bytes_ = 0;
  bool float64_ = false, drawn_ = false;
  std::vector<uint32_t> entries_;
  std::vector<uint16_t> entry_of_;
};

}  // namespace recap::cuda
