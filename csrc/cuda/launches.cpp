#include "launches.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "engine.h"

namespace recap::cuda {
namespace {

constexpr uint16_t kNoEntry = 0xffff;

FormatEntry format_entry(const Slot& slot) {
  const Format& format = *slot.format;
  FormatEntry entry = {};
  std::copy(std::begin(slot.state), std::end(slot.state), entry.state);
  for (int k = 0; k < kMaxStates; ++k) entry.scale[k] = static_cast<float*>(format.scale[k]);
  entry.rest = format.rest;
  entry.seed = format.seed;
  entry.first_element = format.first_element;
  entry.grad = format.grad;
  entry.state_dtype = format.state;
  entry.param = format.param;
  entry.draws_for_states = format.draws_for_states;
  entry.has_codes = format.has_codes;
  return entry;
}

}  // namespace

DeviceTable make_device_table(const Plan& plan) {
  DeviceTable table;
  table.tiles.reserve(plan.tiles.size());
  for (const Tile& tile : plan.tiles) {
    const bool is_next = table.tiles.empty() || tile.slot != table.tiles.back().slot;
    if (tile.size > kTileSize ||
        (is_next && !table.tiles.empty() && tile.slot < table.tiles.back().slot)) {
      throw std::invalid_argument(
          "a CUDA plan needs tiles of at most cuda::kTileSize elements, in slot order");
    }
    const Slot& slot = plan.slots[tile.slot];
    const int64_t offset = tile.begin * dtype_size(slot.dtype);
    TileEntry entry = {};
    entry.param = static_cast<char*>(slot.param) + offset;
    entry.begin = tile.begin;
    entry.slot = tile.slot;
    entry.size = static_cast<uint16_t>(tile.size);
    entry.dtype = slot.dtype;
    entry.has_format = slot.format != nullptr;
    if (slot.format) {
      if (is_next) table.formats.push_back(format_entry(slot));
      entry.state[0] = reinterpret_cast<void*>(table.formats.size() - 1);
    } else {
      for (int k = 0; k < kMaxStates; ++k) {
        if (slot.state[k]) entry.state[k] = static_cast<char*>(slot.state[k]) + offset;
      }
    }
    table.tiles.push_back(entry);
  }
  return table;
}

Launches::Launches(const Plan& plan) : slots_(static_cast<uint32_t>(plan.slots.size())) {
  for (const Slot& slot : plan.slots) {
    is_float64_.push_back(slot.dtype == Dtype::float64);
    draws_.push_back(slot.format && slot.format->draws());
  }
  first_tile_of_slot_.assign(slots_ + 1, 0);
  for (const Tile& tile : plan.tiles) ++first_tile_of_slot_[tile.slot + 1];
  for (uint32_t slot = 0; slot < slots_; ++slot) {
    first_tile_of_slot_[slot + 1] += first_tile_of_slot_[slot];
  }
}

Launches::Demand Launches::demand(const Step& step) {
  return {step.grads,
          step.values_of_slot,
          step.values.size(),
          sizeof(ArgumentsHeader),
          sizeof(UpdateValues<float>) + sizeof(EntryUpdate),
          sizeof(UpdateValues<double>),
          sizeof(uint64_t),
          false,
          false};
}

Launches::Demand Launches::demand(const DeviceStep& step) {
  return {step.grads,
          step.group_of_slot,
          step.groups.size(),
          sizeof(DeviceArgumentsHeader),
          sizeof(DeviceGroup),
          0,
          0,
          true,
          step.rates != nullptr};
}

bool Launches::is_active(const Demand& demand, uint32_t slot) const {
  return demand.grads[slot] &&
         (demand.counts || first_tile_of_slot_[slot] != first_tile_of_slot_[slot + 1]);
}

uint32_t Launches::next_active(const Demand& demand, uint32_t slot) const {
  while (slot < slots_ && !is_active(demand, slot)) ++slot;
  return slot;
}

bool Launches::accept(const Demand& demand, uint32_t slot) {
  uint16_t& entry = entry_of_[demand.entry_of_slot[slot]];
  const size_t entries = entries_.size() + (entry == kNoEntry ? 1 : 0);
  const bool float64 = float64_ || is_float64_[slot], drawn = drawn_ || draws_[slot];
  const size_t bytes = demand.header_bytes + (slot + 1 - begin_) * sizeof(SlotGrad) +
                       entries * (demand.entry_bytes + (float64 ? demand.float64_bytes : 0) +
                                  (drawn ? demand.step_bytes : 0));
  if (entries > kMaxEntries || bytes > kLargeArguments) return false;
  if (entry == kNoEntry) {
    entry = static_cast<uint16_t>(entries_.size());
    entries_.push_back(demand.entry_of_slot[slot]);
  }
  float64_ = float64;
  drawn_ = drawn;
  end_ = slot + 1;
  argument_bytes_ = bytes;
  return true;
}

bool Launches::first(const Demand& demand) {
  next_begin_ = next_active(demand, 0);
  if (next_begin_ < slots_) return next(demand);
  begin_ = end_ = 0;
  entries_.clear();
  argument_bytes_ = demand.header_bytes;
  return demand.always;
}

bool Launches::next(const Demand& demand) {
  begin_ = end_ = next_begin_;
  if (begin_ == slots_) return false;
  float64_ = drawn_ = false;
  entries_.clear();
  entry_of_.assign(demand.entries, kNoEntry);
  while (next_begin_ < slots_ && accept(demand, next_begin_)) {
    next_begin_ = next_active(demand, next_begin_ + 1);
  }
  return true;
}

const FormatEntry* Launches::formats_behind(const TileEntry* tiles) const {
  return reinterpret_cast<const FormatEntry*>(tiles + first_tile_of_slot_[slots_]);
}

void Launches::write(const Step& step, const TileEntry* tiles, unsigned char* out) const {
  const size_t slots = end_ - begin_;
  ArgumentsHeader header;
  header.tiles = tiles + first_tile();
  header.formats = formats_behind(tiles);
  header.first_slot = begin_;
  header.grads = sizeof header;
  header.float64_values = header.grads + slots * sizeof(SlotGrad);
  header.steps =
      header.float64_values + (float64_ ? entries_.size() * sizeof(UpdateValues<double>) : 0);
  header.float32_values = header.steps + (drawn_ ? entries_.size() * sizeof(uint64_t) : 0);
  header.updates = header.float32_values + entries_.size() * sizeof(UpdateValues<float>);
  header.clears_grads = std::any_of(entries_.begin(), entries_.end(), [&step](uint32_t entry) {
    return step.values[entry].clears_grads;
  });
  std::memcpy(out, &header, sizeof header);
  write_grads(step.grads, step.values_of_slot, out + header.grads);
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Values& values = step.values[entries_[i]];
    if (float64_) {
      std::memcpy(out + header.float64_values + i * sizeof values.float64, &values.float64,
                  sizeof values.float64);
    }
    if (drawn_)
      std::memcpy(out + header.steps + i * sizeof values.step, &values.step, sizeof values.step);
    std::memcpy(out + header.float32_values + i * sizeof values.float32, &values.float32,
                sizeof values.float32);
    out[header.updates + i] =
        static_cast<unsigned char>(static_cast<unsigned>(values.update) |
                                   (values.clears_grads ? EntryUpdate::kClearsGrads : 0));
  }
}

void Launches::write(const DeviceStep& step, const TileEntry* tiles, uint32_t* ticket,
                     unsigned char* out) const {
  const size_t slots = end_ - begin_;
  DeviceArgumentsHeader header = {};
  header.tiles = tiles + first_tile();
  header.formats = formats_behind(tiles);
  header.grad_scale = step.grad_scale;
  header.found_inf = step.found_inf;
  header.counts = step.counts + begin_;
  header.ticket = ticket;
  if (step.rates && next_begin_ == slots_) header.rates = *step.rates;
  header.first_slot = begin_;
  header.slots = static_cast<uint32_t>(slots);
  header.tile_count = this->tiles();
  header.block_count = blocks();
  header.grads = sizeof header;
  header.groups = header.grads + slots * sizeof(SlotGrad);
  header.clears_grads = std::any_of(entries_.begin(), entries_.end(), [&step](uint32_t entry) {
    return step.groups[entry].hyper.clears_grads;
  });
  std::memcpy(out, &header, sizeof header);
  write_grads(step.grads, step.group_of_slot, out + header.grads);
  for (size_t i = 0; i < entries_.size(); ++i) {
    std::memcpy(out + header.groups + i * sizeof(DeviceGroup), &step.groups[entries_[i]],
                sizeof(DeviceGroup));
  }
}

void Launches::write_grads(const std::vector<const void*>& grads,
                           const std::vector<uint32_t>& entry_of_slot, unsigned char* out) const {
  for (uint32_t slot = begin_; slot < end_; ++slot) {
    SlotGrad grad;
    if (grads[slot]) {
      const auto address = reinterpret_cast<uintptr_t>(grads[slot]);
      if (address >> SlotGrad::kAddressBits) {
        throw std::invalid_argument("a gradient's address has more than 56 bits");
      }
      grad.bits = uint64_t{entry_of_[entry_of_slot[slot]]} << SlotGrad::kAddressBits | address;
    }
    std::memcpy(out + (slot - begin_) * sizeof grad, &grad, sizeof grad);
  }
}

}  // namespace recap::cuda
