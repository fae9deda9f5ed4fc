// Which slots lie over the same elements in memory.
#pragma once

#include <utility>
#include <vector>

#include "slot_tensors.h"

namespace recap {

// Pairs of slots, by index, of which an element of one is in the memory of an element of the other.
// Those that take turns in the same memory, such as columns of one tensor, share nothing.
std::vector<std::pair<size_t, size_t>> slots_that_share(const std::vector<SlotTensors>& slots);

}  // namespace recap
