// Gradients that a step leaves at zero: those of groups with clear_grads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../plan/plan.h"
#include "probe.h"
#include "python.h"
#include "slot_tensors.h"
#include "step_gradients.h"

namespace recap {

class ClearedGradients {
 public:
  // The slots [begin, end) of `slots` are those of a group with clear_grads.
  void add_group(size_t begin, size_t end);
  void set_slots(const std::vector<Slot>& slots);

  bool has_any() const { return has_any_; }
  bool has(size_t slot) const { return clears_[slot] != 0; }

  // What a step has read, with `grads` the addresses for the engines, and that of the sparse ones.
  // Afterwards `in_step` says whether the engines may write the zeros: not if two gradients share
  // memory, of which one would be zero before it is read, nor if one is copied on write.
  void read(const std::vector<SlotTensors>& slots, std::vector<Probe>& probes,
            const StepGradients& gradients, const std::vector<const void*>& grads);
  bool in_step() const { return in_step_; }

  // Changes their versions: the engines are about to write them.
  void bump_versions();

  // Writes zeros to those that the engines leave alone, or if the step is not taken to all.
  void finish(bool stepped);

  // Lets go of what was read.
  void release() { read_.clear(); }

 private:
  struct Read {
    at::Tensor whole, local;  // of a DTensor its local shard, of any other gradient itself
    bool is_own;              // what the engine reads, not a copy
  };

  using Extent = std::pair<uintptr_t, uintptr_t>;
  bool share_memory(const std::vector<const void*>& grads, std::vector<Extent> extents) const;

  bool has_any_ = false;
  bool in_step_ = true;
  bool share_memory_ = false;
  std::vector<char> clears_;
  std::vector<int64_t> bytes_;          // of each slot's gradient
  std::vector<const void*> last_seen_;  // addresses that `share_memory_` was found for
  std::vector<Read> read_;
};

}  // namespace recap
