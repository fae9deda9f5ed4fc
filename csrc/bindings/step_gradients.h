// The gradients that one step has read.
#pragma once

#include <c10/core/Storage.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "../plan/step.h"
#include "probe.h"
#include "python.h"
#include "slot_tensors.h"
#include "sparse_gradient.h"

namespace recap {

class StepGradients {
 public:
  // Of `step`, which outlives it; the addresses of dense ones are its `grads`.
  explicit StepGradients(Step& step) : step_(step) {}

  void resize(size_t slots) {
    step_.grads.resize(slots);
    is_sparse_.assign(slots, 0);
  }

  bool has(size_t slot) const { return is_dense(slot) || is_sparse(slot); }
  bool is_dense(size_t slot) const { return step_.grads[slot] != nullptr; }
  bool is_sparse(size_t slot) const { return is_sparse_[slot] != 0; }

  bool has_sparse() const { return !step_.sparse.empty(); }

  void read_sparse(size_t slot, const SlotTensors& tensors, const Hyper& hyper,
                   const at::Tensor& grad) {
    sparse_.read(static_cast<uint32_t>(slot), tensors, hyper, grad);
    is_sparse_[slot] = 1;
  }

  // All are read.
  void finish() { step_.sparse = sparse_.gradients(); }

  void forget_sparse() {
    for (const SparseGradient& gradient : sparse_.gradients()) is_sparse_[gradient.slot] = 0;
    step_.sparse.clear();
    sparse_.clear();
  }

  // Keeps memory that the step reads, also if another thread drops what it belongs to.
  void hold(c10::Storage memory) { held_.push_back(std::move(memory)); }

  void release() {
    // The step has evicted them since, and references are counted one after the other.
    for (size_t i = 0; i < held_.size(); ++i) {
      if (i + kPrefetchSlots < held_.size()) {
        __builtin_prefetch(held_[i + kPrefetchSlots].unsafeGetStorageImpl(), 1);
      }
      held_[i] = {};
    }
    held_.clear();
    forget_sparse();
  }

 private:
  Step& step_;
  SparseGradients sparse_;
  std::vector<char> is_sparse_;
  std::vector<c10::Storage> held_;
};

}  // namespace recap
