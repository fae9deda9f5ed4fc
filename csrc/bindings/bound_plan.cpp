// How a bound plan is built, adopted and let go of.
#include "bound_plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "../cpu/engine.h"
#include "devices.h"
#include "mapping.h"

namespace recap {
namespace {

// Up to so many bytes of parameters a step on the CPU keeps the GIL. It takes about a millisecond,
// less than Python itself keeps a thread waiting, and to hold gradients would cost some percent.
constexpr int64_t kShortStep = 4 * 1024 * 1024;

// What is neither true nor false, the group's reader refuses by name.
bool is_capturable(const py::dict& group) {
  if (!group.contains("capturable")) return false;
  const int truth = PyObject_IsTrue(group["capturable"].ptr());
  if (truth < 0) PyErr_Clear();
  return truth == 1;
}

// The mapping with the state of a parameter; an empty one if it has none.
py::object state_of(const py::dict& states, const py::object& param, const std::string& name) {
  py::object state = item_of(states, param);
  if (!state) return py::dict();
  if (is_mapping(state)) return state;
  throw py::type_error("the state of parameter " + name + " is a " +
                       std::string(py::str(py::type::of(state).attr("__name__"))) +
                       "; it must be a dict of its tensors");
}

// Beside the states of tensors it may hold whatever the user has put there.
DictSnapshot snapshot_of(const py::dict& states) {
  return DictSnapshot(states, [](py::handle key) { return THPVariable_Check(key.ptr()); });
}

}  // namespace

BoundPlan::BoundPlan(const std::vector<GroupSource>& groups,
                     const std::vector<py::object>& optimizers,
                     const std::vector<NewState>& new_states, bool device_values)
    : device_values_(device_values) {
  for (const py::object& optimizer : optimizers) {
    const py::object param_groups = optimizer.attr("param_groups");
    owners_.push_back({py::weakref(optimizer), optimizer.attr("state"), param_groups,
                       ListSnapshot(param_groups), optimizer.attr("_optimizer_step_pre_hooks"),
                       optimizer.attr("_optimizer_step_post_hooks"), optimizer.ptr()});
  }
  for (const GroupSource& source : groups) device_values_ |= is_capturable(source.group);
  // A plan takes memory and copies, which a graph that is captured would take in place of the plan.
  for (const at::Device device : cuda_devices_of(groups)) DevicePlan::refuse_capture(device);
  std::map<size_t, const NewState*> made_for;
  for (const NewState& made : new_states) made_for[made.slot] = &made;
  std::set<PyObject*> seen_states;
  for (const GroupSource& source : groups) {
    GroupReader reader(source.algorithm, source.group, source.name, source.clears_grads,
                       device_values_);
    ListSnapshot params(source.group["params"]);
    const size_t begin = slots_.size();
    for (size_t i = 0; i < params.size(); ++i) {
      const auto param = py::reinterpret_borrow<py::object>(params[i]);
      const auto made = made_for.find(slots_.size());
      py::object state = made == made_for.end()
                             ? state_of(source.state, param, source.names.at(i))
                             : new_states_.add(*made->second, source.state, param);
      slots_.emplace_back(source.names.at(i), param, std::move(state), reader.hyper(),
                          reader.formats());
    }
    groups_.push_back({std::move(reader), std::move(params), begin, slots_.size()});
    if (source.clears_grads) cleared_.add_group(begin, slots_.size());
  }
  check_devices();
  shared_memory_ = SharedMemory(slots_);
  first_.assign(slots_.size(), 0);
  for (const NewState& made : new_states) {
    first_.at(made.slot) = made.is_first;
    any_first_ |= made.is_first;
  }
  std::vector<Slot> slots;
  int64_t bytes = 0;
  for (const SlotTensors& slot : slots_) {
    slots.push_back(slot.slot());
    bytes += slots.back().size * dtype_size(slots.back().dtype);
    has_state_.push_back(slot.has_state());
    has_inference_tensors_ |= !slot.is_inert() && slot.param().is_inference();
    has_host_values_ |= !slot.is_inert() && !is_stepped_on_device(slot);
  }
  cleared_.set_slots(slots);
  make_engine_plans(slots);
  gives_up_gil_ |= bytes > kShortStep || has_device_plans();
  for (const GroupSource& source : groups) {
    if (!seen_states.insert(source.state.ptr()).second) continue;
    states_.push_back(snapshot_of(source.state));
  }
  gradients_.resize(slots_.size());
  capture_.resize(slots_.size());
  step_.values_of_slot.resize(slots_.size());
}

bool BoundPlan::is_stepped_on_device(const SlotTensors& slot) const {
  return device_values_ && !slot.is_inert() &&
         engine_for(slot.param().device()) == EngineKind::cuda;
}

void BoundPlan::check_devices() const {
  for (const PlanGroup& group : groups_) {
    const at::Tensor& lr = group.reader.device_lr();
    for (size_t i = group.begin; i < group.end; ++i) {
      if (slots_[i].is_inert()) continue;
      const at::Device device = slots_[i].param().device();
      if (group.reader.capturable() && engine_for(device) != EngineKind::cuda) {
        throw py::value_error(group.reader.name() + " has capturable=True, but its parameter " +
                              slots_[i].name() + " is on " + device.str() +
                              "; move it to a CUDA device or leave capturable off");
      }
      if (lr.defined() && lr.device() != device) {
        throw py::value_error("the lr of " + group.reader.name() + " is a tensor on " +
                              lr.device().str() + ", but its parameter " + slots_[i].name() +
                              " is on " + device.str() +
                              "; pass a number, or a group for each device");
      }
    }
  }
}

// Each engine has all slots, so that one index serves everywhere, but those of others without size.
void BoundPlan::make_engine_plans(const std::vector<Slot>& slots) {
  CudaDevices devices;
  cpu_plan_.slots = slots;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots_[i].is_inert()) continue;
    const at::Device device = slots_[i].param().device();
    if (engine_for(device) == EngineKind::cpu) continue;
    cpu_plan_.slots[i].size = 0;
    devices.insert(device);
  }
  cpu_plan_.tiles = cut_tiles(cpu_plan_.slots, cpu::kTileSize);
  for (const at::Device device : devices) {
    std::vector<Slot> own = slots;
    for (size_t i = 0; i < own.size(); ++i) {
      if (slots_[i].is_inert() || slots_[i].param().device() != device) own[i].size = 0;
    }
    device_plans_.emplace_back(device, own);
  }
  scheduled_rates_.assign(groups_.size(), nullptr);
  if (!device_values_) return;
  for (const PlanGroup& group : groups_) {
    const auto index = static_cast<uint32_t>(device_step_.groups.size());
    device_step_.group_of_slot.resize(group.end, index);
    device_step_.groups.emplace_back();
  }
}

void BoundPlan::adopt() {
  if (is_adopted_) return;
  for (SlotTensors& slot : slots_) slot.adopt();
  host_values_.take_step_counts(
      slots_, [this](const SlotTensors& slot) { return is_stepped_on_device(slot); });
  if (device_values_) {
    for (DevicePlan& plan : device_plans_) plan.take_step_counts(slots_, first_);
  }
  watch_slots();
  is_adopted_ = true;
}

void BoundPlan::watch_slots() {
  std::vector<std::shared_ptr<StateBlock>> blocks;
  probes_.clear();
  for (const SlotTensors& slot : slots_) probes_.push_back(slot.probe(blocks));
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  blocks_.clear();
  for (auto& block : blocks) {
    const uint64_t released = block->released();
    blocks_.push_back({std::move(block), released});
  }
}

// What a plan sees of the optimizers' states is looked at anew, before anything is written.
void BoundPlan::put_new_states() {
  new_states_.put();
  new_states_.each_put(
      [this](size_t slot, const py::object& state) { slots_[slot].move_state(state); });
  watch_slots();
  for (DictSnapshot& state : states_) state = snapshot_of(state.dict());
}

void BoundPlan::set_clipping(HostClipping clipping) {
  clipping_ = std::move(clipping);
  gives_up_gil_ |= clipping_.calls_python();
}

void BoundPlan::set_schedules(const std::vector<size_t>& groups, const at::Tensor& schedules,
                              const at::Tensor& rates, const at::Tensor& step) {
  for (size_t i = 0; i < groups.size(); ++i) {
    scheduled_rates_.at(groups[i]) = rates.const_data_ptr<double>() + i;
  }
  for (DevicePlan& plan : device_plans_) {
    if (plan.device() == rates.device()) plan.set_schedules(schedules, rates, step);
  }
}

void BoundPlan::clear() {
  is_adopted_ = false;
  // What they own may be asked for by what is called when it goes: not before all is empty.
  const auto owners = std::move(owners_);
  const auto groups = std::move(groups_);
  const auto states = std::move(states_);
  const auto slots = std::move(slots_);
  const auto new_states = std::move(new_states_);
  const auto clipping = std::move(clipping_);
  owners_.clear();
  groups_.clear();
  states_.clear();
  slots_.clear();
  new_states_ = {};
  probes_.clear();
  blocks_.clear();
  capture_.clear();
}

}  // namespace recap
