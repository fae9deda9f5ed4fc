// A plan bound to the Python objects it was built from: param groups, parameters and optimizer
// state. One `step` checks that all of them are still what they were, reads gradients and
// hyperparameters, and runs the engine. Everything that can fail comes before the first write.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "group_reader.h"
#include "python.h"
#include "slot_tensors.h"

namespace recap {

enum class Outcome {
  stepped,
  skipped,      // found_inf was set: nothing was written
  stale,        // something changed since the plan was built: build another
  needs_state,  // slots without state have a gradient: make their state and build another
};

// One param group, as Python hands it over.
struct GroupSource {
  std::string algorithm;           // "adam", "adagrad" or "sgd"
  std::string name;                // for errors
  py::dict group;                  // the torch param group
  py::dict state;                  // the optimizer's state
  std::vector<std::string> names;  // one per parameter, for errors
};

class BoundPlan {
 public:
  // `lists` are the optimizers' param_groups, which must keep holding the groups; `first` holds the
  // flat indices of slots whose momentum buffer is new.
  BoundPlan(const std::vector<GroupSource>& groups, const std::vector<py::list>& lists,
            const std::vector<size_t>& first);

  // `grad_scale` and `found_inf` are one-element tensors, numbers or None.
  Outcome step(const py::object& grad_scale, const py::object& found_inf);

  // After `needs_state`: the flat indices of the slots to make state for.
  const std::vector<size_t>& slots_without_state() const { return slots_without_state_; }

 private:
  // Where a slot's step count is; null if its algorithm does not count.
  struct Counter {
    void* data = nullptr;
    bool is_double = false;

    double increment() const;
  };

  struct Group {
    GroupReader reader;
    ListSnapshot params;
    size_t begin, end;  // its slots
  };

  void refuse_shared_memory() const;
  void share_step_counter();
  bool groups_unchanged();
  bool read_slots();  // false: a slot changed since the plan was built
  void fill_values(double grad_scale);

  std::vector<ListSnapshot> lists_;
  std::vector<Group> groups_;
  std::vector<DictSnapshot> states_;  // one for each distinct optimizer state
  std::vector<SlotTensors> slots_;
  std::vector<Probe> probes_;  // of slots_
  std::vector<Counter> counters_;
  std::vector<char> has_state_;
  std::vector<char> first_;  // the momentum buffer is new
  Plan plan_;
  Step step_;
  std::vector<uint32_t> copied_;  // slots that this step must copy in and out
  std::vector<size_t> slots_without_state_;
};

}  // namespace recap
