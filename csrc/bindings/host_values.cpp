#include "host_values.h"

#include <ATen/ops/empty.h>

#include <cstring>

namespace recap {
namespace {

// A step count may be a view of any bytes, at whatever address.
template <typename T>
double add_at(void* memory, double difference) {
  T count;
  std::memcpy(&count, memory, sizeof(count));
  count += static_cast<T>(difference);
  std::memcpy(memory, &count, sizeof(count));
  return count;
}

}  // namespace

double HostValues::Counter::add(double difference) const {
  if (!data) return 1.0;
  return is_double ? add_at<double>(data, difference) : add_at<float>(data, difference);
}

HostValues::Counter HostValues::counter_of(SlotTensors& slot) {
  const at::Tensor& step = slot.step_count();
  if (!step.defined()) return {};
  const bool counts = step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble;
  if (!step.device().is_cpu() || is_wrapper_subclass(step) || !counts) {
    const at::ScalarType dtype = counts ? step.scalar_type() : at::kDouble;
    slot.set_step_count(
        at::empty({}, at::TensorOptions(at::kCPU).dtype(dtype)).copy_(step.detach().reshape({})));
  }
  const at::Tensor& own = slot.step_count();
  return {own.mutable_data_ptr(), own.scalar_type() == at::kDouble};
}

void HostValues::fill(const std::vector<PlanGroup>& groups, const std::vector<SlotTensors>& slots,
                      const std::vector<Probe>& probes, const std::vector<char>& is_first,
                      const StepGradients& gradients, double grad_scale, double clip, Step& step) {
  const double factor = gradient_factor(grad_scale, clip);
  step.values.clear();
  for (const PlanGroup& group : groups) {
    entries_.clear();
    const size_t base = step.values.size();
    for (size_t slot = group.begin; slot < group.end; ++slot) {
      prefetch(probes, slot);
      if (!gradients.has(slot)) continue;
      const Entry entry = {counters_[slot].add(1.0), is_first[slot] != 0,
                           gradients.is_sparse(slot)};
      // Nearly always the only one, and the last.
      size_t index = entries_.size();
      while (index > 0 && !(entries_[index - 1] == entry)) --index;
      if (index == 0) {
        if (counters_[slot].data && (entry.step < 1.0 || !SlotTensors::is_step_count(entry.step))) {
          undo(gradients, slot + 1);
          throw py::value_error(slots[slot].wrong_step_count(entry.step - 1.0));
        }
        entries_.push_back(entry);
        index = entries_.size();
        const Hyper& hyper = group.reader.hyper();
        step.values.emplace_back();
        maker_.make(hyper, entry.step, entry.first, factor, step.values.back());
        // Autograd may give the memory of its values to another gradient too.
        if (entry.sparse) step.values.back().clears_grads = false;
        if (entry.sparse && hyper.algorithm == Algorithm::adam && !hyper.adam.lazy) {
          add_eps_before_correction(step.values.back());
        }
      }
      step.values_of_slot[slot] = static_cast<uint32_t>(base + index - 1);
      probes[slot].bump_version();
    }
  }
}

// Of the steps and of the versions: each in memory of its own, which the reading of so many slots
// has evicted.
void HostValues::prefetch(const std::vector<Probe>& probes, size_t slot) const {
  if (slot + 2 * kPrefetchSlots < probes.size()) probes[slot + 2 * kPrefetchSlots].prefetch_leaf();
  if (slot + kPrefetchSlots < probes.size()) {
    probes[slot + kPrefetchSlots].prefetch_version();
    __builtin_prefetch(counters_[slot + kPrefetchSlots].data, 1);
  }
}

void HostValues::undo(const StepGradients& gradients, size_t end) {
  for (size_t slot = 0; slot < end; ++slot) {
    if (gradients.has(slot)) counters_[slot].add(-1.0);
  }
}

}  // namespace recap
