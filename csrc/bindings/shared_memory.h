// Which slots lie over the same elements in memory: they would be updated twice, or by two threads
// at once.
#pragma once

#include <utility>
#include <vector>

#include "slot_tensors.h"
#include "step_gradients.h"

namespace recap {

class SharedMemory {
 public:
  SharedMemory() = default;
  explicit SharedMemory(const std::vector<SlotTensors>& slots);

  bool empty() const { return pairs_.empty(); }

  // Raises ValueError naming two parameters that share memory and both have a gradient: a frozen
  // alias of a parameter does no harm.
  void refuse(const std::vector<SlotTensors>& slots, const StepGradients& gradients) const;

 private:
  // Of slots, of which an element of one is in the memory of an element of the other. Those that
  // take turns in the same memory, such as columns of one tensor, share nothing.
  std::vector<std::pair<size_t, size_t>> pairs_;
};

}  // namespace recap
