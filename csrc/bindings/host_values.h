// Step counts in the memory of the host, and the values that a step computes from them there.
#pragma once

#include <cstddef>
#include <vector>

#include "../plan/step.h"
#include "plan_group.h"
#include "probe.h"
#include "slot_tensors.h"
#include "step_gradients.h"

namespace recap {

class HostValues {
 public:
  // Counts in the memory of each state's `step`, which others may hold or share. One that is
  // elsewhere than on the CPU, or not in a dtype that counts, is replaced by a copy. Slots for
  // which `on_device` holds are counted there.
  template <typename OnDevice>
  void take_step_counts(std::vector<SlotTensors>& slots, OnDevice&& on_device) {
    counters_.clear();
    for (SlotTensors& slot : slots) {
      counters_.push_back(on_device(slot) ? Counter() : counter_of(slot));
    }
  }

  // Counts a step for each slot with a gradient, and fills in the values of `step`; `is_first` says
  // whose momentum buffer is new. Raises ValueError for a count that is none, having counted none.
  void fill(const std::vector<PlanGroup>& groups, const std::vector<SlotTensors>& slots,
            const std::vector<Probe>& probes, const std::vector<char>& is_first,
            const StepGradients& gradients, double grad_scale, double clip, Step& step);

  // Takes it back.
  void undo(const StepGradients& gradients) { undo(gradients, counters_.size()); }

 private:
  // Where a slot's step count is; null if its algorithm does not count.
  struct Counter {
    void* data = nullptr;
    bool is_double = false;

    double add(double difference) const;  // returns the new count
  };

  // Slots of a group with the same step share their values.
  struct Entry {
    double step;
    bool first;
    bool sparse;  // of a sparse gradient

    bool operator==(const Entry& other) const {
      return step == other.step && first == other.first && sparse == other.sparse;
    }
  };

  static Counter counter_of(SlotTensors& slot);
  void prefetch(const std::vector<Probe>& probes, size_t slot) const;
  void undo(const StepGradients& gradients, size_t end);  // of the slots before that

  std::vector<Counter> counters_;
  ValuesMaker maker_;
  std::vector<Entry> entries_;  // of the group that is being filled in
};

}  // namespace recap
