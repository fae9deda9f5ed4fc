#include "launches.h"

#include <cstring>
#include <stdexcept>

#include "engine.h"

namespace recap::cuda {
namespace {

constexpr uint16_t kNoEntry = 0xffff;

}  // namespace

std::vector<TileEntry> make_tile_table(const Plan& plan) {
  std::vector<TileEntry> table;
  table.reserve(plan.tiles.size());
  for (const Tile& tile : plan.tiles) {
    if (tile.size > kTileSize || (!table.empty() && tile.slot < table.back().slot)) {
      throw std::invalid_argument(
          "a CUDA plan needs tiles of at most cuda::kTileSize elements, in slot order");
    }
    const Slot& slot = plan.slots[tile.slot];
    const int64_t offset = tile.begin * dtype_size(slot.dtype);
    TileEntry entry = {};
    entry.param = static_cast<char*>(slot.param) + offset;
    for (int k = 0; k < kMaxStates; ++k) {
      if (slot.state[k]) entry.state[k] = static_cast<char*>(slot.state[k]) + offset;
    }
    entry.begin = tile.begin;
    entry.slot = tile.slot;
    entry.size = static_cast<uint16_t>(tile.size);
    entry.dtype = slot.dtype;
    table.push_back(entry);
  }
  return table;
}

Launches::Launches(const Plan& plan) : slots_(static_cast<uint32_t>(plan.slots.size())) {
  for (const Slot& slot : plan.slots) is_float64_.push_back(slot.dtype == Dtype::float64);
  first_tile_of_slot_.assign(slots_ + 1, 0);
  for (const Tile& tile : plan.tiles) ++first_tile_of_slot_[tile.slot + 1];
  for (uint32_t slot = 0; slot < slots_; ++slot) {
    first_tile_of_slot_[slot + 1] += first_tile_of_slot_[slot];
  }
}

size_t Launches::argument_bytes(size_t slots, size_t entries, bool float64) {
  const size_t per_entry =
      sizeof(UpdateValues<float>) + (float64 ? sizeof(UpdateValues<double>) : 0) + sizeof(Update);
  return sizeof(ArgumentsHeader) + slots * (sizeof(void*) + sizeof(uint8_t)) + entries * per_entry;
}

bool Launches::is_active(const Step& step, uint32_t slot) const {
  return step.grads[slot] && first_tile_of_slot_[slot] != first_tile_of_slot_[slot + 1];
}

bool Launches::accept(const Step& step, uint32_t slot) {
  uint16_t& entry = entry_of_[step.values_of_slot[slot]];
  const size_t entries = entries_.size() + (entry == kNoEntry ? 1 : 0);
  const bool float64 = float64_ || is_float64_[slot];
  if (entries > kMaxEntries ||
      argument_bytes(slot + 1 - begin_, entries, float64) > kLargeArguments) {
    return false;
  }
  if (entry == kNoEntry) {
    entry = static_cast<uint16_t>(entries_.size());
    entries_.push_back(step.values_of_slot[slot]);
  }
  float64_ = float64;
  end_ = slot + 1;
  return true;
}

bool Launches::first(const Step& step) {
  end_ = 0;
  return next(step);
}

bool Launches::next(const Step& step) {
  uint32_t slot = end_;
  while (slot < slots_ && !is_active(step, slot)) ++slot;
  begin_ = slot;
  float64_ = false;
  entries_.clear();
  entry_of_.assign(step.values.size(), kNoEntry);
  while (slot < slots_ && (!is_active(step, slot) || accept(step, slot))) ++slot;
  return begin_ < slots_;
}

void Launches::write(const Step& step, const TileEntry* tiles, unsigned char* out) const {
  const size_t slots = end_ - begin_;
  ArgumentsHeader header;
  header.tiles = tiles + first_tile();
  header.first_slot = begin_;
  header.grads = sizeof header;
  header.float64_values = header.grads + slots * sizeof(void*);
  header.float32_values =
      header.float64_values + (float64_ ? entries_.size() * sizeof(UpdateValues<double>) : 0);
  header.updates = header.float32_values + entries_.size() * sizeof(UpdateValues<float>);
  header.entry_of_slot = header.updates + entries_.size() * sizeof(Update);
  std::memcpy(out, &header, sizeof header);
  std::memcpy(out + header.grads, &step.grads[begin_], slots * sizeof(void*));
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Values& values = step.values[entries_[i]];
    if (float64_) {
      std::memcpy(out + header.float64_values + i * sizeof values.float64, &values.float64,
                  sizeof values.float64);
    }
    std::memcpy(out + header.float32_values + i * sizeof values.float32, &values.float32,
                sizeof values.float32);
    out[header.updates + i] = static_cast<unsigned char>(values.update);
  }
  for (uint32_t slot = begin_; slot < end_; ++slot) {
    out[header.entry_of_slot + (slot - begin_)] =
        step.grads[slot] ? static_cast<unsigned char>(entry_of_[step.values_of_slot[slot]]) : 0;
  }
}

}  // namespace recap::cuda
