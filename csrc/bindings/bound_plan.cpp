#include "bound_plan.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>
#include <set>

#include "../cpu/engine.h"
#include "thread_pool.h"

namespace recap {
namespace {

Algorithm algorithm_named(const std::string& name) {
  if (name == "adam") return Algorithm::adam;
  if (name == "adagrad") return Algorithm::adagrad;
  if (name == "sgd") return Algorithm::sgd;
  throw py::value_error("unknown algorithm '" + name + "'");
}

// How many slots ahead a step reads, to hide the latency of memory that backward has evicted.
constexpr size_t kPrefetch = 8;

// The value of a one-element tensor or a number; `none` for None.
double scalar(const py::object& value, const char* name, double none) {
  if (value.is_none()) return none;
  if (THPVariable_Check(value.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.numel() == 1) return tensor.item().toDouble();
  } else if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
    return value.cast<double>();
  }
  throw py::type_error(std::string(name) + " must be None, a number or a one-element tensor");
}

}  // namespace

BoundPlan::BoundPlan(const std::vector<GroupSource>& groups, const std::vector<py::list>& lists,
                     const std::vector<size_t>& first)
    : lists_(lists.begin(), lists.end()) {
  std::set<PyObject*> seen_states;
  for (const GroupSource& source : groups) {
    GroupReader reader(algorithm_named(source.algorithm), source.group, source.name);
    ListSnapshot params(source.group["params"]);
    const size_t begin = slots_.size();
    for (size_t i = 0; i < params.size(); ++i) {
      const auto param = py::reinterpret_borrow<py::object>(params[i]);
      const py::dict state =
          source.state.contains(param) ? py::dict(source.state[param]) : py::dict();
      slots_.emplace_back(source.names.at(i), param, state, reader.hyper());
    }
    groups_.push_back({std::move(reader), std::move(params), begin, slots_.size()});
  }
  refuse_shared_memory();
  share_step_counter();
  for (const GroupSource& source : groups) {
    if (seen_states.insert(source.state.ptr()).second) states_.emplace_back(source.state);
  }
  first_.assign(slots_.size(), 0);
  for (const size_t slot : first) first_.at(slot) = 1;
  for (const SlotTensors& slot : slots_) {
    plan_.slots.push_back(slot.slot());
    probes_.push_back(slot.probe());
    const at::Tensor& count = slot.step_count();
    counters_.push_back(count.defined()
                            ? Counter{count.mutable_data_ptr(), count.scalar_type() == at::kDouble}
                            : Counter{});
    has_state_.push_back(slot.has_state());
  }
  plan_.tiles = cut_tiles(plan_.slots, cpu::kTileSize);
  step_.grads.resize(slots_.size());
  step_.values_of_slot.resize(slots_.size());
}

// Two slots over the same memory would be updated twice, or by two threads at once.
void BoundPlan::refuse_shared_memory() const {
  struct Extent {
    const char *begin, *end;
    const SlotTensors* slot;
  };
  const auto refuse = [](const SlotTensors& a, const SlotTensors& b) {
    throw py::value_error("parameters " + a.name() + " and " + b.name() +
                          " share memory; pass each parameter once, in one param group");
  };
  std::map<const void*, const SlotTensors*> seen;
  std::vector<Extent> extents;
  for (const SlotTensors& slot : slots_) {
    const auto [first, is_new] = seen.emplace(slot.param().unsafeGetTensorImpl(), &slot);
    if (!is_new) refuse(*first->second, slot);
    const Slot memory = slot.slot();
    const int64_t bytes = slot.param().numel() * dtype_size(memory.dtype);
    const auto* begin = static_cast<const char*>(memory.param);
    if (bytes > 0) extents.push_back({begin, begin + bytes, &slot});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) refuse(*extents[i - 1].slot, *extents[i].slot);
  }
}

// Step counts sit in one buffer, of which each state's `step` is a view: a step then touches a few
// cache lines, where separate tensors would take one each.
void BoundPlan::share_step_counter() {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    std::vector<SlotTensors*> counted;
    std::set<const void*> storages;
    for (SlotTensors& slot : slots_) {
      const at::Tensor& step = slot.step_count();
      if (!step.defined() || step.scalar_type() != dtype) continue;
      counted.push_back(&slot);
      storages.insert(step.storage().unsafeGetStorageImpl());
    }
    if (storages.size() <= 1) continue;
    const at::Tensor buffer =
        at::empty({static_cast<int64_t>(counted.size())}, at::TensorOptions().dtype(dtype));
    for (size_t i = 0; i < counted.size(); ++i) {
      at::Tensor counter = buffer.select(0, static_cast<int64_t>(i));
      counter.copy_(counted[i]->step_count().reshape({}));
      counted[i]->set_step_count(counter);
    }
  }
}

bool BoundPlan::groups_unchanged() {
  for (const ListSnapshot& list : lists_) {
    if (!list.unchanged()) return false;
  }
  for (Group& group : groups_) {
    if (!group.reader.refresh() || !group.params.unchanged()) return false;
  }
  for (const DictSnapshot& state : states_) {
    if (!state.unchanged()) return false;
  }
  return true;
}

bool BoundPlan::read_slots() {
  copied_.clear();
  slots_without_state_.clear();
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
    if (!address) {
      bool needs_copy = false;
      address = slots_[slot].gradient(grad, needs_copy);
      if (needs_copy) copied_.push_back(static_cast<uint32_t>(slot));
    }
    if (!has_state_[slot]) slots_without_state_.push_back(slot);
  }
  return true;
}

double BoundPlan::Counter::increment() const {
  if (!data) return 1.0;
  return is_double ? *static_cast<double*>(data) += 1.0 : *static_cast<float*>(data) += 1.0f;
}

void BoundPlan::fill_values(double grad_scale) {
  step_.values.clear();
  for (const Group& group : groups_) {
    double last_step = -1.0;
    char last_first = 0;
    for (size_t slot = group.begin; slot < group.end; ++slot) {
      if (!step_.grads[slot]) continue;
      const double step = counters_[slot].increment();
      if (step != last_step || first_[slot] != last_first) {
        step_.values.push_back(make_values(group.reader.hyper(), step, first_[slot], grad_scale));
        last_step = step;
        last_first = first_[slot];
      }
      step_.values_of_slot[slot] = static_cast<uint32_t>(step_.values.size() - 1);
      first_[slot] = 0;
      probes_[slot].bump_version();
    }
  }
}

Outcome BoundPlan::step(const py::object& grad_scale, const py::object& found_inf) {
  const double scale = scalar(grad_scale, "grad_scale", 1.0);
  if (!groups_unchanged() || !read_slots()) return Outcome::stale;
  if (scalar(found_inf, "found_inf", 0.0) != 0.0) return Outcome::skipped;
  if (!slots_without_state_.empty()) return Outcome::needs_state;

  for (const uint32_t slot : copied_) slots_[slot].copy_in();
  fill_values(scale);
  {
    py::gil_scoped_release release;
    cpu::run(plan_, step_, torch_thread_pool());
  }
  for (const uint32_t slot : copied_) slots_[slot].copy_out();
  return Outcome::stepped;
}

}  // namespace recap
