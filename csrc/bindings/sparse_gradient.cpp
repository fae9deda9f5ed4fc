#include "sparse_gradient.h"

#include <ATen/SparseTensorImpl.h>
#include <ATen/ops/empty.h>

#include <sstream>

#include "devices.h"

namespace recap {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const SlotTensors& tensors, const Parts&... parts) {
  std::ostringstream out;
  out << "parameter " << tensors.name() << " has a Sparse gradient";
  (out << ... << parts);
  throw std::runtime_error(out.str());
}

// `grad` has sparse COO layout, and is no wrapper.
const at::SparseTensorImpl& impl_of(const at::Tensor& grad) {
  return *static_cast<const at::SparseTensorImpl*>(grad.unsafeGetTensorImpl());
}

constexpr const char* kRemedy =
    ", build the layer with sparse=False, or step it with a torch.optim class";

// What torch's own step refuses as well, and SGD's momentum, which would move every row.
void check_options(const SlotTensors& tensors, const Hyper& hyper) {
  if (!hyper.takes_sparse()) refuse(tensors, ", which this optimizer does not take", kRemedy);
  const auto refuse_option = [&](const char* option, const auto& value) {
    refuse(tensors, ", which the fused step does not take with ", option, "=", value,
           ": set it to 0", kRemedy);
  };
  switch (hyper.algorithm) {
    case Algorithm::sgd:
      if (hyper.sgd.momentum != 0.0) refuse_option("momentum", hyper.sgd.momentum);
      if (hyper.sgd.weight_decay != 0.0) refuse_option("weight_decay", hyper.sgd.weight_decay);
      return;
    case Algorithm::adagrad:
      if (hyper.adagrad.weight_decay != 0.0) {
        refuse_option("weight_decay", hyper.adagrad.weight_decay);
      }
      return;
    case Algorithm::adam: {
      if (hyper.adam.lazy || (hyper.adam.weight_decay == 0.0 && !hyper.adam.amsgrad)) return;
      const bool decays = hyper.adam.weight_decay != 0.0;
      refuse(tensors, ", which the fused step takes as torch.optim.SparseAdam does, without ",
             decays ? "weight_decay" : "amsgrad", ": set it to ", decays ? "0" : "False",
             ", or lazy=True, which updates the rows that were looked up by Adam's own rule",
             kRemedy);
    }
    default: return;
  }
}

}  // namespace

at::Tensor SparseGradients::values_of(const at::Tensor& grad) { return impl_of(grad).values(); }

void SparseGradients::read(uint32_t slot, const SlotTensors& tensors, const Hyper& hyper,
                           const at::Tensor& grad) {
  const at::Tensor& param = tensors.param();
  if (tensors.is_dtensor())
    refuse(tensors, ", the parameter is a DTensor; build the layer with sparse=False");
  if (grad.layout() != at::kSparse) {
    std::ostringstream layout;
    layout << grad.layout();
    throw std::runtime_error("parameter " + tensors.name() + " has a " + layout.str() +
                             " gradient; the fused step takes dense gradients and sparse COO ones");
  }
  if (is_wrapper_subclass(grad)) {
    refuse(tensors, " that is a tensor subclass, whose memory the fused step cannot reach");
  }
  if (engine_for(param.device()) == EngineKind::cuda || !grad.device().is_cpu()) {
    refuse(tensors, " on ", grad.device(),
           ", and the fused step takes such on the CPU only: fuse the table on FBGEMM "
           "(recap_fast.embeddings.fuse_embeddings)",
           kRemedy);
  }
  if (tensors.format()) {
    refuse(tensors,
           ", which the fused step does not take with state_dtype, master_weights or "
           "stochastic_rounding: leave them out of its param group",
           kRemedy);
  }
  if (grad.dtype() != param.dtype() || grad.sizes() != param.sizes()) {
    refuse(tensors, " of ", grad.dtype(), " ", grad.sizes(), ", the parameter is ", param.dtype(),
           " ", param.sizes(), "; they must agree");
  }
  check_options(tensors, hyper);
  const at::SparseTensorImpl& sparse = impl_of(grad);
  if (is_freed(sparse.values()) || is_freed(sparse.indices())) {
    refuse(tensors, " whose memory was freed; set it to None, or compute it again");
  }
  const int64_t count = param.numel() > 0 ? sparse.nnz() : 0;
  if (sparse.sparse_dim() != 1 && count > 0) {
    refuse(tensors, " with ", sparse.sparse_dim(),
           " sparse dimensions; the fused step takes gradients of whole rows, with one: "
           "coalesce it so, as by to_sparse(1)",
           kRemedy);
  }
  if (!param.is_contiguous()) {
    refuse(tensors, ", but its rows have the strides ", param.strides(),
           "; make the parameter contiguous", kRemedy);
  }

  if (held_.size() == gradients_.size()) held_.push_back(std::make_unique<Held>());
  Held& held = *held_[gradients_.size()];
  // Copies, of the size of the gradient, only where its own memory is not in order.
  const auto in_order = [](const at::Tensor& tensor) {
    if (tensor.is_contiguous() && !is_lazy(tensor) && is_aligned(tensor)) return tensor;
    return at::empty(tensor.sizes(), at::TensorOptions(at::kCPU).dtype(tensor.dtype()))
        .copy_(tensor.detach());
  };
  held.values = in_order(sparse.values());
  const at::Tensor indices = in_order(sparse.indices());
  const int64_t rows = param.dim() == 0 ? 1 : param.size(0);
  const int64_t* const looked_up = count > 0 ? indices.const_data_ptr<int64_t>() : nullptr;
  if (!held.lookups.take(looked_up, count, rows)) {
    held.values.reset();
    refuse(tensors, " of rows that the parameter does not have: it has ", rows);
  }
  const void* const values = count > 0 ? held.values.const_data_ptr() : nullptr;
  gradients_.push_back({slot, tensors.row_size(), values, &held.lookups});
}

void SparseGradients::clear() {
  for (size_t i = 0; i < gradients_.size(); ++i) held_[i]->values.reset();
  gradients_.clear();
}

}  // namespace recap
