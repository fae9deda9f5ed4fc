#include "cleared_gradients.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "local_tensor.h"
#include "sparse_gradient.h"

namespace recap {
namespace {

// All of the memory that the values of a sparse gradient are in.
std::pair<uintptr_t, uintptr_t> values_extent(const at::Tensor& gradient) {
  const c10::Storage memory = SparseGradients::values_of(gradient).storage();
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  return {begin, begin + memory.nbytes()};
}

}  // namespace

void ClearedGradients::add_group(size_t begin, size_t end) {
  has_any_ = true;
  clears_.resize(std::max(clears_.size(), end), 0);
  std::fill(clears_.begin() + begin, clears_.begin() + end, 1);
}

void ClearedGradients::set_slots(const std::vector<Slot>& slots) {
  clears_.resize(slots.size(), 0);
  for (const Slot& slot : slots) bytes_.push_back(slot.size * dtype_size(slot.dtype));
}

bool ClearedGradients::share_memory(const std::vector<const void*>& grads,
                                    std::vector<Extent> extents) const {
  for (size_t slot = 0; slot < grads.size(); ++slot) {
    const auto begin = reinterpret_cast<uintptr_t>(grads[slot]);
    if (begin && bytes_[slot] > 0) extents.emplace_back(begin, begin + bytes_[slot]);
  }
  std::sort(extents.begin(), extents.end());
  // Each is whole: if any two overlap, so do two neighbours.
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return true;
  }
  return false;
}

void ClearedGradients::read(const std::vector<SlotTensors>& slots, std::vector<Probe>& probes,
                            const StepGradients& gradients, const std::vector<const void*>& grads) {
  std::vector<Extent> of_sparse;
  for (size_t slot = 0; gradients.has_sparse() && slot < slots.size(); ++slot) {
    if (gradients.is_sparse(slot)) of_sparse.push_back(values_extent(probes[slot].grad()));
  }
  if (!of_sparse.empty() || grads != last_seen_) {  // buffers that are kept are where they were
    share_memory_ = share_memory(grads, of_sparse);
    last_seen_ = of_sparse.empty() ? grads : std::vector<const void*>();
  }
  in_step_ = !share_memory_;
  read_.clear();
  for (size_t slot = 0; slot < slots.size(); ++slot) {
    if (!has(slot) || !gradients.has(slot)) continue;
    const at::Tensor& whole = probes[slot].grad();
    if (gradients.is_sparse(slot)) {
      read_.push_back({whole, whole, false});
      continue;
    }
    const at::Tensor local = slots[slot].grad();
    if (local.numel() == 0 || local._is_zerotensor()) continue;
    const bool is_own = !is_lazy(local) && local.const_data_ptr() == grads[slot];
    if (is_own && is_copied_on_write(local.storage().data_ptr())) in_step_ = false;
    read_.push_back({whole, local, is_own});
  }
}

void ClearedGradients::bump_versions() {
  for (const Read& each : read_) {
    if (in_step_ && each.is_own) recap::bump_versions(each.whole, each.local);
  }
}

void ClearedGradients::finish(bool stepped) {
  // Gradients may require gradients themselves, or have been made in inference mode.
  const c10::InferenceMode no_autograd;
  for (const Read& each : read_) {
    if (!(stepped && in_step_ && each.is_own)) distinct_elements(each.local).zero_();
  }
}

}  // namespace recap
