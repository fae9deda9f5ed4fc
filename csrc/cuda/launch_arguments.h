// What the kernels read besides the tensors themselves. The stable part is a table of tiles in
// device memory; what changes from step to step travels as a kernel's one parameter, so that a step
// needs no copy. Plain C++, shared by the host, which writes both, and the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../plan/plan.h"
#include "device_step.h"

namespace recap::cuda {

// One tile, its addresses already advanced to its first element: the only thing in device memory
// that a thread block must wait for before it asks for elements.
struct alignas(16) TileEntry {
  void* param;
  void* state[kMaxStates];  // if the slot has a format, the first is its number
  int64_t begin;            // the first element's index in the slot, for the gradient
  uint32_t slot;
  uint16_t size;  // elements
  Dtype dtype;
  bool has_format;

  RECAP_INLINE uintptr_t format() const { return reinterpret_cast<uintptr_t>(state[0]); }
};

// A slot's format, in device memory behind the tiles, and its arrays but for param and gradient.
struct alignas(16) FormatEntry {
  void* state[kMaxStates];
  float* scale[kMaxStates];
  void* rest;
  uint64_t seed;
  int64_t first_element;
  Dtype grad, state_dtype;
  ParamRounding param;
  bool draws_for_states;
  bool has_codes;

  RECAP_INLINE bool draws() const { return draws_for_states || param == ParamRounding::stochastic; }
};

// The address of a slot's gradient, and in the highest byte its entry, which is an index into the
// tables per entry: a process's own addresses end at 2^56, even with five levels of page tables.
struct SlotGrad {
  static constexpr int kAddressBits = 56;

  uint64_t bits = 0;  // 0: the slot is skipped

  RECAP_INLINE const void* address() const {
    return reinterpret_cast<const void*>(bits & ((uint64_t{1} << kAddressBits) - 1));
  }
  RECAP_INLINE uint32_t entry() const { return static_cast<uint32_t>(bits >> kAddressBits); }
};

// What an entry does with its slots; the highest bit says whether gradients are zero afterwards.
struct EntryUpdate {
  static constexpr uint8_t kClearsGrads = 0x80;

  uint8_t bits;

  RECAP_INLINE Update update() const { return static_cast<Update>(bits & ~kClearsGrads); }
  RECAP_INLINE bool clears_grads() const { return bits & kClearsGrads; }
};
static_assert(kRowUpdates <= EntryUpdate::kClearsGrads);

// The front of the parameter if values come from the host. Offsets are in bytes from the header's
// own address.
struct ArgumentsHeader {
  const TileEntry* tiles;      // of the launch's first block
  const FormatEntry* formats;  // all of them
  uint32_t first_slot;         // of `grads`
  uint32_t grads;              // offset of SlotGrad, one per slot
  uint32_t
      float64_values;  // offset of UpdateValues<double>, one per entry, if some slot needs them
  uint32_t float32_values;  // offset of UpdateValues<float>, one per entry
  uint32_t updates;         // offset of EntryUpdate, one per entry
  uint32_t steps;           // offset of uint64_t, the step of each entry, if some slot draws
  uint32_t clears_grads;    // whether some entry does
};

// The same if they come from the device. An entry is a group.
struct DeviceArgumentsHeader {
  const TileEntry* tiles;
  const FormatEntry* formats;
  const float *grad_scale, *found_inf;  // as in DeviceStep
  float* counts;                        // one per slot of the launch
  uint32_t* ticket;                     // how many blocks have read theirs; 0 between launches
  RateTable rates;                      // of a step's last launch, else empty
  uint32_t first_slot;
  uint32_t slots;
  uint32_t tile_count;   // blocks beyond it have no tile
  uint32_t block_count;  // at least 1
  uint32_t grads;        // offset of SlotGrad, one per slot
  uint32_t groups;       // offset of DeviceGroup, one per entry
  uint32_t clears_grads;
};

template <typename Header, int kBytes>
struct alignas(8) Arguments {
  Header header;
  unsigned char tables[kBytes - sizeof(Header)];
};

// The sizes of parameter to choose from. A launch copies all of it, so that a model of up to some
// 400 tensors should not carry the largest. A launch takes 4 KB everywhere, and 32,764 bytes from
// CUDA 12.1 on.
constexpr int kSmallArguments = 4096;
constexpr int kLargeArguments = 32760;
constexpr int kMaxEntries = 1 << (64 - SlotGrad::kAddressBits);

}  // namespace recap::cuda
