// What the kernel reads besides the tensors themselves. The stable part is a table of tiles in
// device memory; what changes from step to step travels as the kernel's one parameter, so that a
// step needs no copy. Plain C++, shared by the host, which writes both, and the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../plan/plan.h"

namespace recap::cuda {

// One tile, its addresses already advanced to its first element: the only thing in device memory
// that a thread block must wait for before it asks for elements.
struct alignas(16) TileEntry {
  void* param;
  void* state[kMaxStates];
  int64_t begin;  // the first element's index in the slot, for the gradient
  uint32_t slot;
  uint16_t size;  // elements
  Dtype dtype;
};

// The front of the parameter. Offsets are in bytes from the header's own address.
struct ArgumentsHeader {
  const TileEntry* tiles;  // of the launch's first block
  uint32_t first_slot;     // the tables per slot start with it
  uint32_t grads;          // offset of const void*, one per slot; null: the slot is skipped
  uint32_t
      float64_values;  // offset of UpdateValues<double>, one per entry, if some slot needs them
  uint32_t float32_values;  // offset of UpdateValues<float>, one per entry
  uint32_t updates;         // offset of Update, one per entry
  uint32_t entry_of_slot;   // offset of uint8_t, one per slot
};

template <int kBytes>
struct alignas(8) Arguments {
  ArgumentsHeader header;
  unsigned char tables[kBytes - sizeof(ArgumentsHeader)];
};

// The sizes of parameter to choose from. A launch copies all of it, so that a model of up to some
// 400 tensors should not carry the largest. A launch takes 4 KB everywhere, and 32,764 bytes from
// CUDA 12.1 on.
constexpr int kSmallArguments = 4096;
constexpr int kLargeArguments = 32760;
constexpr int kMaxEntries = 256;  // entry_of_slot is a byte

}  // namespace recap::cuda
