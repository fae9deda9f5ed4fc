#include "cleared_gradients.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "local_tensor.h"

namespace recap {

void ClearedGradients::add_group(size_t begin, size_t end) {
  has_any_ = true;
  clears_.resize(std::max(clears_.size(), end), 0);
  std::fill(clears_.begin() + begin, clears_.begin() + end, 1);
}

void ClearedGradients::set_slots(const std::vector<Slot>& slots) {
  clears_.resize(slots.size(), 0);
  for (const Slot& slot : slots) bytes_.push_back(slot.size * dtype_size(slot.dtype));
}

bool ClearedGradients::share_memory(const std::vector<const void*>& grads) const {
  std::vector<std::pair<uintptr_t, uintptr_t>> extents;
  for (size_t slot = 0; slot < grads.size(); ++slot) {
    const auto begin = reinterpret_cast<uintptr_t>(grads[slot]);
    if (begin && bytes_[slot] > 0) extents.emplace_back(begin, begin + bytes_[slot]);
  }
  std::sort(extents.begin(), extents.end());
  // Dense and in order: if any two overlap, so do two neighbours.
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return true;
  }
  return false;
}

void ClearedGradients::read(const std::vector<SlotTensors>& slots, std::vector<Probe>& probes,
                            const StepGradients& gradients, const std::vector<const void*>& grads) {
  if (grads != last_seen_) {  // buffers that are kept are where they were
    in_step_ = !share_memory(grads);
    last_seen_ = grads;
  }
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
    read_.push_back({whole, local, in_step_ && is_own});
  }
}

void ClearedGradients::bump_versions() {
  for (const Read& each : read_) {
    if (!each.by_engine) continue;
    for (const at::Tensor& written : {each.whole, each.local}) {
      if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
      if (written.is_same(each.local)) break;
    }
  }
}

void ClearedGradients::finish(bool stepped) {
  // Gradients may require gradients themselves, or have been made in inference mode.
  const c10::InferenceMode no_autograd;
  for (const Read& each : read_) {
    if (!stepped || !each.by_engine) distinct_elements(each.local).zero_();
  }
}

}  // namespace recap
