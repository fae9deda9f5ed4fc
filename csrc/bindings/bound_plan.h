// A plan bound to the Python objects it was built from: param groups, parameters and optimizer
// state. One `step` checks that all of them are still what they were, reads gradients and
// hyperparameters, and runs the engine. Everything that can fail comes before the first write.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "capture_guard.h"
#include "cleared_gradients.h"
#include "device_plan.h"
#include "host_clipping.h"
#include "host_values.h"
#include "new_state.h"
#include "plan_group.h"
#include "python.h"
#include "shared_memory.h"
#include "slot_tensors.h"
#include "step_gradients.h"
#include "unscale.h"

namespace recap {

enum class Outcome {
  stepped,
  skipped,      // found_inf was set or the norm to clip is not finite: nothing was written
  stale,        // something changed since the plan was built: build another
  needs_state,  // slots without state have a gradient: make their state and build another
};

class BoundPlan {
 public:
  // `optimizers` are those that the groups are from, in the same order; they must go on holding the
  // same groups and state, and outlive the plan's steps. `new_states` are those that the optimizers
  // do not have yet: the first step puts them there. With `device_values`, step counts of CUDA
  // parameters are kept on their device, and what follows from them is computed there: a step then
  // never waits for the device. A group with capturable=True asks for the same. Changes nothing
  // that is the optimizers'.
  BoundPlan(const std::vector<GroupSource>& groups, const std::vector<py::object>& optimizers,
            const std::vector<NewState>& new_states, bool device_values);

  // Has the optimizers' states hold what the engines step: counts where those count, and copies of
  // tensors that they cannot step where they are. Once; until then, and after `clear`, every step
  // is `stale`.
  void adopt();

  // The first three are one-element tensors, numbers or None. `grad_scale` divides gradients as
  // they are read, `unscale_by` those in memory afterwards, unless `found_inf` is not 0. `others`
  // is a sequence of callables, which are called before anything is written, as soon as nothing
  // stands against this step: for parameters that have another one, to be taken together with it.
  Outcome step(const py::object& grad_scale, const py::object& found_inf,
               const py::object& unscale_by, const py::sequence& others);

  // A step in which nobody else has a part; false if it was not taken, and `step` is to be called:
  // also if an optimizer has hooks, which are called around it.
  bool step_plainly();

  // Whether one of the `others` raised the error of the last step.
  bool failed_elsewhere() const { return failed_elsewhere_; }

  // For the garbage collector: calls `visit` with every Python object that the plan owns.
  template <typename Visit>
  void each_reference(Visit&& visit) const {
    for (const Owner& owner : owners_) {
      visit(owner.optimizer);
      visit(owner.state);
      visit(owner.param_groups);
      visit(owner.pre_hooks);
      visit(owner.post_hooks);
      owner.groups.each_reference(visit);
    }
    for (const PlanGroup& group : groups_) {
      group.reader.each_reference(visit);
      group.params.each_reference(visit);
    }
    for (const DictSnapshot& state : states_) state.each_reference(visit);
    for (const SlotTensors& slot : slots_) slot.each_reference(visit);
    new_states_.each_reference(visit);
    visit(clipping_.total());
  }

  // And lets go of all of them.
  void clear();

  // With device values: `groups` have their learning rates, one after the other, in `rates`, which
  // every step moves on by `schedules`; see DevicePlan::set_schedules.
  void set_schedules(const std::vector<size_t>& groups, const at::Tensor& schedules,
                     const at::Tensor& rates, const at::Tensor& step);

  // From now on gradients are scaled down to a global norm. Not for a plan with CUDA devices.
  void set_clipping(HostClipping clipping);

  // The norm that the last step found, before clipping.
  double grad_norm() const { return clipping_.norm(); }

  // For a plan with CUDA devices: the sum of squares of each part's gradients, as a float64 tensor
  // on the device of the first slot. Empty if a step would build another plan first.
  std::vector<at::Tensor> sums_of_squares(const std::vector<uint32_t>& part_of_slot, size_t parts);

  bool has_device_plans() const { return !device_plans_.empty(); }

  // Whether a CUDA graph has captured a step: it reads the memory of this plan ever after.
  bool is_captured() const { return capture_.has_captured(); }

  // Raises RuntimeError if a learning rate on the host, or the tensor that has it, is not the one
  // that was captured.
  void check_captured_rates() { capture_.check_rates(groups_, scheduled_rates_); }

  // After `needs_state`: the flat indices of the slots to make state for.
  const std::vector<size_t>& slots_without_state() const { return slots_without_state_; }

 private:
  // A torch optimizer, and what must still be its own.
  struct Owner {
    py::weakref optimizer;  // weak: it owns the plan
    py::object state;
    py::object param_groups;  // a list, or a tuple that a user put there
    ListSnapshot groups;
    py::dict pre_hooks, post_hooks;
    PyObject* object;  // a hint for `prefetch` alone

    bool unchanged() const;
    void prefetch() const;
  };

  // Memory of states, and what it had released when they were last looked at.
  struct WatchedBlock {
    std::shared_ptr<StateBlock> memory;
    uint64_t released;
  };

  // While it lives, no other thread steps the plan, and what `read_slots` has read stays in memory.
  class Turn {
   public:
    explicit Turn(BoundPlan& plan);
    ~Turn();
    Turn(const Turn&) = delete;

   private:
    BoundPlan& plan_;
  };

  // Building.
  bool is_stepped_on_device(const SlotTensors& slot) const;
  void check_devices() const;
  void make_engine_plans(const std::vector<Slot>& slots);
  void watch_slots();

  // Stepping.
  bool groups_unchanged();
  bool blocks_unchanged();
  bool read_slots();  // false: a slot changed since the plan was built
  void read_unusual(size_t slot, const at::Tensor& grad);
  void sort_lookups();
  std::vector<ScaledGradient> gradients_kept();  // those that the step has read and does not clear
  void call_others(const py::sequence& others);
  void put_new_states();
  Outcome skip_step();
  void run_device_plans(const py::object& grad_scale, const py::object& found_inf);
  void remember_gradients();

  std::vector<Owner> owners_;
  std::vector<PlanGroup> groups_;
  std::vector<DictSnapshot> states_;  // one for each distinct optimizer state
  NewStates new_states_;
  std::vector<SlotTensors> slots_;
  std::vector<Probe> probes_;  // of slots_
  std::vector<WatchedBlock> blocks_;
  std::vector<char> has_state_;
  std::vector<char> first_;  // the momentum buffer is new
  bool any_first_ = false;
  bool has_host_values_ = false;
  bool has_inference_tensors_ = false;
  SharedMemory shared_memory_;
  bool device_values_;
  Plan cpu_plan_;
  std::vector<DevicePlan> device_plans_;
  Step step_;
  StepGradients gradients_{step_};
  ClearedGradients cleared_;
  HostValues host_values_;
  HostClipping clipping_;
  CaptureGuard capture_;
  cuda::DeviceStep device_step_;
  std::vector<const double*> scheduled_rates_;  // one per group, on the device; null: not scheduled
  std::vector<uint32_t> copied_;                // slots that this step must copy in and out
  std::vector<size_t> slots_without_state_;
  // Whether a step lets other threads run Python, which may drop a gradient: then it holds them.
  bool gives_up_gil_ = false;
  bool holds_ = false;  // in this step
  bool failed_elsewhere_ = false;
  bool is_adopted_ = false;
  std::mutex stepping_;
  std::thread::id stepped_by_;
};

}  // namespace recap
