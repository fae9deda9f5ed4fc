#include "bound_plan.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>

#include "../cpu/engine.h"
#include "../cpu/sparse.h"
#include "devices.h"
#include "held_signals.h"
#include "mapping.h"
#include "scalar.h"
#include "shared_memory.h"
#include "thread_pool.h"

namespace recap {
namespace {

// How many slots ahead a step reads, to hide the latency of memory that backward has evicted.
constexpr size_t kPrefetch = 8;
constexpr size_t kPrefetchGroups = 2;  // likewise

// Up to so many bytes of parameters a step on the CPU keeps the GIL. It takes about a millisecond,
// less than Python itself keeps a thread waiting, and to hold gradients would cost some percent.
constexpr int64_t kShortStep = 4 * 1024 * 1024;

// A step count may be a view of any bytes, at whatever address.
template <typename T>
double add_at(void* memory, double difference) {
  T count;
  std::memcpy(&count, memory, sizeof(count));
  count += static_cast<T>(difference);
  std::memcpy(memory, &count, sizeof(count));
  return count;
}

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

struct DeviceOrder {
  bool operator()(at::Device a, at::Device b) const { return a.index() < b.index(); }
};

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
  refuse_capture(groups);
  std::map<size_t, const NewState*> made_for;
  for (const NewState& made : new_states) made_for[made.slot] = &made;
  std::set<PyObject*> seen_states;
  for (const GroupSource& source : groups) {
    GroupReader reader(source.algorithm, source.group, source.name, device_values_);
    ListSnapshot params(source.group["params"]);
    const size_t begin = slots_.size();
    for (size_t i = 0; i < params.size(); ++i) {
      const auto param = py::reinterpret_borrow<py::object>(params[i]);
      const auto made = made_for.find(slots_.size());
      py::object state = made == made_for.end()
                             ? state_of(source.state, param, source.names.at(i))
                             : new_states_.add(*made->second, source.state, param);
      slots_.emplace_back(source.names.at(i), param, std::move(state), reader.hyper());
    }
    groups_.push_back({std::move(reader), std::move(params), begin, slots_.size()});
  }
  check_devices();
  shared_memory_ = slots_that_share(slots_);
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
    gives_up_gil_ |= slot.is_dtensor();
    has_state_.push_back(slot.has_state());
    has_inference_tensors_ |= !slot.is_inert() && slot.param().is_inference();
    has_host_values_ |= !slot.is_inert() && !is_stepped_on_device(slot);
  }
  make_parts(slots);
  gives_up_gil_ |= bytes > kShortStep || has_device_plans();
  for (const GroupSource& source : groups) {
    if (!seen_states.insert(source.state.ptr()).second) continue;
    states_.push_back(snapshot_of(source.state));
  }
  take_step_counts();
  watch_slots();
  step_.grads.resize(slots_.size());
  is_sparse_.assign(slots_.size(), 0);
  step_.values_of_slot.resize(slots_.size());
}

// First of all: a state that is laid out anew would be filled when the graph is replayed, if ever.
void BoundPlan::refuse_capture(const std::vector<GroupSource>& groups) {
  std::set<at::Device, DeviceOrder> devices;
  for (const GroupSource& source : groups) {
    for (const py::handle param : source.group["params"]) {
      if (!THPVariable_Check(param.ptr())) continue;
      const at::Device device = THPVariable_Unpack(param.ptr()).device();
      if (engine_for(device) == EngineKind::cuda) devices.insert(device);
    }
  }
  for (const at::Device device : devices) DevicePlan::refuse_capture(device);
}

// Each engine has all slots, so that one index serves everywhere, but those of others without size.
void BoundPlan::make_parts(const std::vector<Slot>& slots) {
  std::set<at::Device, DeviceOrder> devices;
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
  stepped_last_.assign(slots_.size(), 0);
  scheduled_rates_.assign(groups_.size(), nullptr);
  if (!device_values_) return;
  for (const Group& group : groups_) {
    const auto index = static_cast<uint32_t>(device_step_.groups.size());
    device_step_.group_of_slot.resize(group.end, index);
    device_step_.groups.emplace_back();
  }
  for (DevicePlan& part : device_plans_) part.take_step_counts(slots_, first_);
}

// Slots over the same memory would be updated twice, or by two threads at once. That concerns those
// which step together: a frozen alias of a parameter does no harm.
void BoundPlan::refuse_shared_memory() const {
  for (const auto& [a, b] : shared_memory_) {
    if (!has_gradient(a) || !has_gradient(b)) continue;
    throw py::value_error("parameters " + slots_[a].name() + " and " + slots_[b].name() +
                          " share memory; pass each parameter once, in one param group");
  }
}

// A step counts in the memory of each state's `step`, which others may hold or share. One that is
// elsewhere than on the CPU, or not in a dtype that counts, is replaced by a copy.
void BoundPlan::take_step_counts() {
  for (SlotTensors& slot : slots_) {
    const at::Tensor& step = slot.step_count();
    Counter counter;
    if (step.defined() && !is_stepped_on_device(slot)) {
      const bool counts = step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble;
      if (!step.device().is_cpu() || is_wrapper_subclass(step) || !counts) {
        const at::ScalarType dtype = counts ? step.scalar_type() : at::kDouble;
        slot.set_step_count(at::empty({}, at::TensorOptions(at::kCPU).dtype(dtype))
                                .copy_(step.detach().reshape({})));
      }
      const at::Tensor& own = slot.step_count();
      counter = {own.mutable_data_ptr(), own.scalar_type() == at::kDouble};
    }
    counters_.push_back(counter);
  }
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

bool BoundPlan::Owner::unchanged() const {
  static PyObject* const state_name = PyUnicode_InternFromString("state");
  static PyObject* const groups_name = PyUnicode_InternFromString("param_groups");
  const auto self = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(optimizer.ptr()));
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
      const Group& next = groups_[i + kPrefetchGroups];
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

bool BoundPlan::read_slots() {
  if (!blocks_unchanged()) return false;
  copied_.clear();
  slots_without_state_.clear();
  forget_sparse();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slot + kPrefetch < probes_.size()) probes_[slot + kPrefetch].prefetch();
    Probe& probe = probes_[slot];
    if (!probe.unchanged() || (!probe.usual() && !slots_[slot].unchanged())) return false;
    const at::Tensor& grad = probe.grad();
    const void*& address = step_.grads[slot];
    if (!grad.defined()) {
      address = nullptr;
      continue;
    }
    address = probe.plain(grad);
    const bool is_plain = address != nullptr;
    if (!is_plain && grad.layout() != at::kStrided) {
      sparse_.read(static_cast<uint32_t>(slot), slots_[slot], group_of(slot).reader.hyper(), grad);
      is_sparse_[slot] = 1;
      if (slots_[slot].copies_param()) copied_.push_back(static_cast<uint32_t>(slot));
    } else if (!is_plain) {
      bool needs_copy = false;
      address = slots_[slot].gradient(grad, needs_copy);
      if (needs_copy) copied_.push_back(static_cast<uint32_t>(slot));
    }
    if (!has_state_[slot]) slots_without_state_.push_back(slot);
    if (holds_ && is_sparse_[slot]) {
      held_.push_back(slots_[slot].param().storage());
    } else if (holds_) {
      held_.push_back(slots_[slot].param().storage());
      held_.push_back(is_plain ? grad.storage() : slots_[slot].grad().storage());
    }
  }
  if (!shared_memory_.empty()) refuse_shared_memory();
  step_.sparse = sparse_.gradients();
  return true;
}

const BoundPlan::Group& BoundPlan::group_of(size_t slot) const {
  return *std::find_if(groups_.begin(), groups_.end(),
                       [slot](const Group& group) { return slot < group.end; });
}

void BoundPlan::forget_sparse() {
  for (const SparseGradient& gradient : sparse_.gradients()) is_sparse_[gradient.slot] = 0;
  step_.sparse.clear();
  sparse_.clear();
}

double BoundPlan::Counter::add(double difference) const {
  if (!data) return 1.0;
  return is_double ? add_at<double>(data, difference) : add_at<float>(data, difference);
}

void BoundPlan::set_clipping(double max_norm, std::vector<uint32_t> part_of_slot, size_t parts,
                             py::object total) {
  clipping_.max_norm = max_norm;
  clipping_.part_of_slot = std::move(part_of_slot);
  clipping_.parts = parts;
  clipping_.total = std::move(total);
  gives_up_gil_ |= !clipping_.total.is_none();
}

// What to multiply gradients by; NaN: no process is to take the step.
double BoundPlan::clip(double grad_scale, bool found_inf) {
  const std::vector<double>& sums = [&]() -> const std::vector<double>& {
    std::optional<py::gil_scoped_release> release;
    if (gives_up_gil_) release.emplace();
    return clipping_.sums.sums_of_squares(cpu_plan_, step_, clipping_.part_of_slot, clipping_.parts,
                                          torch_thread_pool());
  }();
  double total = 0.0;
  if (clipping_.total.is_none()) {
    for (const double sum : sums) total += sum;
  } else {
    // Also with found_inf, which the others may not have seen: they wait for this one.
    py::list parts;
    for (const double sum : sums) {
      parts.append(found_inf ? std::numeric_limits<double>::infinity() : sum);
    }
    total = clipping_.total(parts).cast<double>();
  }
  clipping_.norm = std::sqrt(total) / grad_scale;
  if (found_inf || !std::isfinite(clipping_.norm)) return std::numeric_limits<double>::quiet_NaN();
  return std::min(1.0, clipping_.max_norm / (clipping_.norm + 1e-6));
}

void BoundPlan::fill_values(double grad_scale, double clip) {
  step_.values.clear();
  for (const Group& group : groups_) {
    entries_.clear();
    const size_t base = step_.values.size();
    for (size_t slot = group.begin; slot < group.end; ++slot) {
      prefetch_counts(slot);
      if (!has_gradient(slot)) continue;
      const Entry entry = {counters_[slot].add(1.0), first_[slot] != 0, is_sparse_[slot] != 0};
      // Nearly always the only one, and the last.
      size_t index = entries_.size();
      while (index > 0 && !(entries_[index - 1] == entry)) --index;
      if (index == 0) {
        if (counters_[slot].data && (entry.step < 1.0 || !SlotTensors::is_step_count(entry.step))) {
          undo_step_counts(slot + 1);
          throw py::value_error(slots_[slot].wrong_step_count(entry.step - 1.0));
        }
        entries_.push_back(entry);
        index = entries_.size();
        const Hyper& hyper = group.reader.hyper();
        step_.values.push_back(
            values_maker_.make(hyper, entry.step, entry.first, grad_scale, clip));
        if (entry.sparse && hyper.algorithm == Algorithm::adam && !hyper.adam.lazy) {
          add_eps_before_correction(step_.values.back());
        }
      }
      step_.values_of_slot[slot] = static_cast<uint32_t>(base + index - 1);
      probes_[slot].bump_version();
    }
  }
}

// Of the steps and of the versions: each in memory of its own, which the reading of so many slots
// has evicted.
void BoundPlan::prefetch_counts(size_t slot) const {
  if (slot + 2 * kPrefetch < probes_.size()) probes_[slot + 2 * kPrefetch].prefetch_leaf();
  if (slot + kPrefetch < probes_.size()) {
    probes_[slot + kPrefetch].prefetch_version();
    __builtin_prefetch(counters_[slot + kPrefetch].data, 1);
  }
}

void BoundPlan::undo_step_counts(size_t end) {
  for (size_t slot = 0; slot < end; ++slot) {
    if (has_gradient(slot)) counters_[slot].add(-1.0);
  }
}

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
  // The step has evicted them since, and references are counted one after the other.
  std::vector<c10::Storage>& held = plan_.held_;
  for (size_t i = 0; i < held.size(); ++i) {
    if (i + kPrefetch < held.size()) {
      __builtin_prefetch(held[i + kPrefetch].unsafeGetStorageImpl(), 1);
    }
    held[i] = {};
  }
  held.clear();
  plan_.forget_sparse();
  plan_.stepped_by_ = {};
  plan_.stepping_.unlock();
}

std::vector<ScaledGradient> BoundPlan::gradients_read() {
  std::vector<ScaledGradient> gradients;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (is_sparse_[slot]) {
      const at::Tensor& grad = probes_[slot].grad();
      gradients.push_back({grad, SparseGradients::values_of(grad)});
    } else if (step_.grads[slot]) {
      gradients.push_back({probes_[slot].grad(), slots_[slot].grad()});
    }
  }
  return gradients;
}

void BoundPlan::call_others(const py::sequence& others) {
  failed_elsewhere_ = true;
  for (const py::handle other : others) other();
  failed_elsewhere_ = false;
}

// What a plan sees of the optimizers' states is looked at anew, before anything is written.
void BoundPlan::put_new_states() {
  new_states_.put();
  new_states_.each_put(
      [this](size_t slot, const py::object& state) { slots_[slot].move_state(state); });
  watch_slots();
  for (DictSnapshot& state : states_) state = snapshot_of(state.dict());
}

Outcome BoundPlan::step(const py::object& grad_scale, const py::object& found_inf,
                        const py::object& unscale_by, const py::sequence& others) {
  const Turn turn(*this);
  failed_elsewhere_ = false;
  const bool has_others = py::len(others) > 0;
  holds_ = gives_up_gil_ || has_others;
  if (is_cleared_ || !groups_unchanged() || !read_slots()) return Outcome::stale;
  check_captured_rates();
  const bool captures = !device_plans_.empty() && check_capture();
  const bool on_host = has_host_values_ && !captures;
  const double scale = on_host ? scalar(grad_scale, "grad_scale", 1.0) : 1.0;
  const bool skip = on_host && scalar(found_inf, "found_inf", 0.0) != 0.0;
  const bool clips = clipping_.max_norm > 0.0;
  if (skip && !clips) return Outcome::skipped;
  if (!slots_without_state_.empty() && !skip) return Outcome::needs_state;

  // Now: another thread may replace them once this one has given up the GIL.
  std::vector<ScaledGradient> scaled;
  if (!unscale_by.is_none()) scaled = gradients_read();
  for (const uint32_t slot : copied_) slots_[slot].copy_in();
  if (!step_.sparse.empty()) sort_lookups();
  const double factor = clips ? clip(scale, skip) : 1.0;
  if (std::isnan(factor)) return Outcome::skipped;
  std::optional<HeldSignals> signals;
  if (has_others) signals.emplace();
  fill_values(scale, factor);
  if (captures) captured_rates_ = rates();
  try {
    if (has_others) call_others(others);
    if (!new_states_.empty()) put_new_states();
    run_device_plans(grad_scale, found_inf);
  } catch (...) {
    undo_step_counts(slots_.size());
    new_states_.take_back();
    throw;
  }
  if (!cpu_plan_.tiles.empty()) {
    std::optional<py::gil_scoped_release> release;
    if (gives_up_gil_) release.emplace();
    cpu::run(cpu_plan_, step_, torch_thread_pool());
  }
  for (const uint32_t slot : copied_) slots_[slot].copy_out();
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

void BoundPlan::clear() {
  is_cleared_ = true;
  // What they own may be asked for by what is called when it goes: not before all is empty.
  const auto owners = std::move(owners_);
  const auto groups = std::move(groups_);
  const auto states = std::move(states_);
  const auto slots = std::move(slots_);
  const auto new_states = std::move(new_states_);
  const auto total = std::move(clipping_.total);
  owners_.clear();
  groups_.clear();
  states_.clear();
  slots_.clear();
  new_states_ = {};
  probes_.clear();
  blocks_.clear();
  captured_rates_.clear();
}

void BoundPlan::remember_gradients() {
  if (any_first_) {
    any_first_ = false;
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      if (has_gradient(slot)) first_[slot] = 0;
      any_first_ |= first_[slot];
    }
  }
  if (!device_values_) return;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    stepped_last_[slot] = has_gradient(slot);
  }
}

}  // namespace recap
