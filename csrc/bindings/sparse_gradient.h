// Sparse gradients of embedding tables, as torch.nn.Embedding(sparse=True) makes them: what must
// hold of them, and what a step holds of them.
#pragma once

#include <memory>
#include <vector>

#include "../plan/step.h"
#include "python.h"
#include "slot_tensors.h"

namespace recap {

class SparseGradients {
 public:
  // Reads `grad`, of sparse layout, as the gradient of `slot`. Neither it nor its memory changes.
  // Raises RuntimeError naming the parameter if its rows cannot be updated by it.
  void read(uint32_t slot, const SlotTensors& tensors, const Hyper& hyper, const at::Tensor& grad);

  // Those that were read since `clear`, for an engine. They hold until then.
  const std::vector<SparseGradient>& gradients() const { return gradients_; }

  // The values of a gradient as torch has them.
  static at::Tensor values_of(const at::Tensor& grad);

  void clear();

 private:
  struct Held {
    at::Tensor values;
    Lookups lookups;
  };

  std::vector<SparseGradient> gradients_;
  std::vector<std::unique_ptr<Held>> held_;  // kept from step to step for its memory
};

}  // namespace recap
