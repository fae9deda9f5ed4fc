// How a bound plan takes a step.
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "../cpu/engine.h"
#include "../cpu/sparse.h"
#include "bound_plan.h"
#include "device_norm.h"
#include "devices.h"
#include "held_signals.h"
#include "scalar.h"
#include "thread_pool.h"

namespace recap {
namespace {

constexpr size_t kPrefetchGroups = 2;  // how many groups ahead a step reads

// The address of a one-element float32 tensor on `device` with the value of `number`; null for
// None. `kept` holds the tensor.
const float* on_device(const py::object& number, const char* name, at::Device device,
                       at::Tensor& kept) {
  if (number.is_none()) return nullptr;
  kept = scalar_on(number, name, device);
  return kept.const_data_ptr<float>();
}

}  // namespace

BoundPlan::Turn::Turn(BoundPlan& plan) : plan_(plan) {
  if (!plan.stepping_.try_lock()) {
    if (plan.stepped_by_ == std::this_thread::get_id()) {
      throw std::runtime_error("step() was called from within a step of the same optimizer");
    }
    const py::gil_scoped_release release;  // which the other thread may need to finish
    plan.stepping_.lock();
  }
  plan.stepped_by_ = std::this_thread::get_id();
}

BoundPlan::Turn::~Turn() {
  plan_.gradients_.release();
  plan_.cleared_.release();
  plan_.stepped_by_ = {};
  plan_.stepping_.unlock();
}

bool BoundPlan::Owner::unchanged() const {
  static PyObject* const state_name = PyUnicode_InternFromString("state");
  static PyObject* const groups_name = PyUnicode_InternFromString("param_groups");
  const py::object self = referent(optimizer);
  const auto own_state =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(self.ptr(), state_name));
  const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(self.ptr(), groups_name));
  if (!own_state || !now) throw py::error_already_set();
  return own_state.is(state) && now.is(param_groups) && groups.unchanged();
}

void BoundPlan::Owner::prefetch() const {
  prefetch_object(optimizer.ptr());
  __builtin_prefetch(object);
  __builtin_prefetch(reinterpret_cast<const char*>(object) - 32);  // the way to its attributes
  groups.prefetch();
}

bool BoundPlan::groups_unchanged() {
  for (size_t i = 0; i < owners_.size(); ++i) {
    if (i + kPrefetchGroups < owners_.size()) owners_[i + kPrefetchGroups].prefetch();
    if (!owners_[i].unchanged()) return false;
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (i + kPrefetchGroups < groups_.size()) {
      const PlanGroup& next = groups_[i + kPrefetchGroups];
      next.reader.prefetch();
      next.params.prefetch();
    }
    if (i + 1 < groups_.size()) groups_[i + 1].reader.prefetch_items();
    if (!groups_[i].reader.refresh() || !groups_[i].params.unchanged()) return false;
  }
  for (DictSnapshot& state : states_) {
    if (!state.unchanged()) return false;
  }
  return !has_inference_tensors_ || c10::InferenceMode::is_enabled();
}

bool BoundPlan::blocks_unchanged() {
  for (WatchedBlock& block : blocks_) {
    const uint64_t released = block.memory->released();
    if (released == block.released) continue;
    for (const Probe& probe : probes_) {
      if (!probe.same_blocks()) return false;
    }
    block.released = released;
  }
  return true;
}

bool BoundPlan::read_slots() {
  if (!blocks_unchanged()) return false;
  copied_.clear();
  slots_without_state_.clear();
  gradients_.forget_sparse();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slot + kPrefetchSlots < probes_.size()) probes_[slot + kPrefetchSlots].prefetch();
    Probe& probe = probes_[slot];
    if (!probe.unchanged() || (!probe.usual() && !slots_[slot].unchanged())) return false;
    const at::Tensor& grad = probe.grad();
    const void*& address = step_.grads[slot];
    address = grad.defined() ? probe.plain(grad) : nullptr;
    if (!grad.defined()) continue;
    const bool is_plain = address != nullptr;
    if (!is_plain && !holds_ && slots_[slot].is_dtensor()) {
      holds_ = true;  // what looks at its sharding is Python: again, with all held
      return read_slots();
    }
    if (!is_plain && slots_[slot].needs_other_format(grad)) return false;
    if (!is_plain) read_unusual(slot, grad);
    if (!has_state_[slot]) slots_without_state_.push_back(slot);
    if (!holds_) continue;
    gradients_.hold(slots_[slot].param().storage());
    if (is_plain) {
      gradients_.hold(grad.storage());
    } else if (gradients_.is_dense(slot)) {
      gradients_.hold(slots_[slot].grad().storage());
    }
  }
  if (!shared_memory_.empty()) shared_memory_.refuse(slots_, gradients_);
  gradients_.finish();
  return true;
}

// A gradient that is not where the engine could read it, or not in the memory order of the
// parameter.
void BoundPlan::read_unusual(size_t slot, const at::Tensor& grad) {
  SlotTensors& tensors = slots_[slot];
  bool needs_copy = false;
  if (grad.layout() == at::kStrided) {
    step_.grads[slot] = tensors.gradient(grad, needs_copy);
    if (tensors.is_dtensor()) probes_[slot].accept_spec_of(probes_[slot].grad());
  } else {
    const auto group =
        std::find_if(groups_.begin(), groups_.end(),
                     [slot](const PlanGroup& candidate) { return slot < candidate.end; });
    gradients_.read_sparse(slot, tensors, group->reader.hyper(), grad);
    needs_copy = tensors.copies_param();
  }
  if (needs_copy) copied_.push_back(static_cast<uint32_t>(slot));
}

std::vector<ScaledGradient> BoundPlan::gradients_kept() {
  std::vector<ScaledGradient> gradients;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (cleared_.has(slot)) continue;
    if (gradients_.is_sparse(slot)) {
      const at::Tensor& grad = probes_[slot].grad();
      gradients.push_back({grad, SparseGradients::values_of(grad)});
    } else if (gradients_.is_dense(slot)) {
      gradients.push_back({probes_[slot].grad(), slots_[slot].grad()});
    }
  }
  return gradients;
}

Outcome BoundPlan::skip_step() {
  cleared_.finish(false);
  return Outcome::skipped;
}

void BoundPlan::call_others(const py::sequence& others) {
  failed_elsewhere_ = true;
  for (const py::handle other : others) other();
  failed_elsewhere_ = false;
}

void BoundPlan::run_device_plans(const py::object& grad_scale, const py::object& found_inf) {
  if (!device_values_) {
    for (DevicePlan& plan : device_plans_) plan.run(step_);
    return;
  }
  device_step_.grads = step_.grads;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const at::Tensor& lr = groups_[i].reader.device_lr();
    cuda::DeviceGroup& group = device_step_.groups[i];
    group = {groups_[i].reader.hyper(), nullptr, true};
    group.hyper.clears_grads &= cleared_.in_step();
    if (scheduled_rates_[i]) {
      group.lr = scheduled_rates_[i];
    } else if (lr.defined()) {
      group.lr = lr.const_data_ptr();
      group.lr_is_double = lr.scalar_type() == at::kDouble;
    }
  }
  for (DevicePlan& plan : device_plans_) {
    at::Tensor scale, inf;
    device_step_.grad_scale = on_device(grad_scale, "grad_scale", plan.device(), scale);
    device_step_.found_inf = on_device(found_inf, "found_inf", plan.device(), inf);
    device_step_.counts = plan.step_counts();
    device_step_.rates = plan.rates();
    plan.run(device_step_);
  }
}

Outcome BoundPlan::step(const py::object& grad_scale, const py::object& found_inf,
                        const py::object& unscale_by, const py::sequence& others) {
  const Turn turn(*this);
  failed_elsewhere_ = false;
  const bool has_others = py::len(others) > 0;
  holds_ = gives_up_gil_ || has_others;
  if (!is_adopted_ || !groups_unchanged() || !read_slots()) return Outcome::stale;
  check_captured_rates();
  const bool captures = !device_plans_.empty() &&
                        capture_.captures(device_plans_, slots_, gradients_, device_values_);
  const bool on_host = has_host_values_ && !captures;
  const double scale = on_host ? scalar(grad_scale, "grad_scale", 1.0) : 1.0;
  const bool skip = on_host && scalar(found_inf, "found_inf", 0.0) != 0.0;
  const bool clips = clipping_.is_on();
  if (cleared_.has_any()) cleared_.read(slots_, probes_, gradients_, step_.grads);
  if (skip && !clips) return skip_step();
  if (!slots_without_state_.empty() && !skip) return Outcome::needs_state;

  // Now: another thread may replace them once this one has given up the GIL.
  std::vector<ScaledGradient> scaled;
  if (!unscale_by.is_none()) scaled = gradients_kept();
  for (const uint32_t slot : copied_) slots_[slot].copy_in();
  if (!step_.sparse.empty()) sort_lookups();
  const double factor =
      clips ? clipping_.factor(cpu_plan_, step_, scale, skip, gives_up_gil_) : 1.0;
  if (std::isnan(factor)) return skip_step();
  std::optional<HeldSignals> signals;
  if (has_others) signals.emplace();
  host_values_.fill(groups_, slots_, probes_, first_, gradients_, scale, factor, step_);
  if (captures) capture_.capture(groups_);
  if (cleared_.has_any()) {
    cleared_.bump_versions();
    for (Values& values : step_.values) values.clears_grads &= cleared_.in_step();
  }
  try {
    if (has_others) call_others(others);
    if (!new_states_.empty()) put_new_states();
    run_device_plans(grad_scale, found_inf);
  } catch (...) {
    host_values_.undo(gradients_);
    new_states_.take_back();
    throw;
  }
  if (!cpu_plan_.tiles.empty()) {
    std::optional<py::gil_scoped_release> release;
    if (gives_up_gil_) release.emplace();
    cpu::run(cpu_plan_, step_, torch_thread_pool());
  }
  for (const uint32_t slot : copied_) slots_[slot].copy_out();
  cleared_.finish(true);
  if (!scaled.empty()) unscale_gradients(scaled, unscale_by, found_inf);
  remember_gradients();
  if (!new_states_.empty()) new_states_.finish();
  return Outcome::stepped;
}

bool BoundPlan::step_plainly() {
  for (const Owner& owner : owners_) {
    if (!owner.pre_hooks.empty() || !owner.post_hooks.empty()) return false;
  }
  const py::none nothing;
  return step(nothing, nothing, nothing, py::tuple()) == Outcome::stepped;
}

void BoundPlan::sort_lookups() {
  std::optional<py::gil_scoped_release> release;
  if (gives_up_gil_) release.emplace();
  cpu::sort_lookups(step_, torch_thread_pool());
}

void BoundPlan::remember_gradients() {
  if (any_first_) {
    any_first_ = false;
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      if (gradients_.has(slot)) first_[slot] = 0;
      any_first_ |= first_[slot];
    }
  }
  if (device_values_) capture_.remember(gradients_);
}

std::vector<at::Tensor> BoundPlan::sums_of_squares(const std::vector<uint32_t>& part_of_slot,
                                                   size_t parts) {
  const Turn turn(*this);
  holds_ = gives_up_gil_;
  if (!is_adopted_ || !groups_unchanged() || !read_slots()) return {};
  capture_.captures(device_plans_, slots_, gradients_, device_values_);
  return recap::sums_of_squares(slots_, probes_, gradients_, part_of_slot, parts);
}

}  // namespace recap
