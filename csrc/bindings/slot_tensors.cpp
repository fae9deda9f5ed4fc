#include "slot_tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <sstream>

#include "devices.h"

namespace recap {
namespace {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::optional<Dtype> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: return std::nullopt;
  }
}

// A dense tensor of `like`'s shape: its own strides if it is dense, else those torch would choose.
at::Tensor dense_like(const at::Tensor& like) {
  return at::zeros_like(like.detach(), like.options(), at::MemoryFormat::Preserve);
}

bool sharded_alike(const py::object& a, const py::object& b) {
  const py::handle first = spec_of(a.ptr()), second = spec_of(b.ptr());
  return first.is(second) || (first.attr("placements").equal(second.attr("placements")) &&
                              first.attr("mesh").equal(second.attr("mesh")));
}

bool has_pending_sums(const py::object& dtensor) {
  for (const py::handle placement : dtensor.attr("placements")) {
    if (placement.attr("is_partial")().cast<bool>()) return true;
  }
  return false;
}

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() &&
         (a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous()));
}

}  // namespace

std::vector<const char*> state_names(const Hyper& hyper) {
  switch (hyper.algorithm) {
    case Algorithm::adam:
      if (hyper.adam.amsgrad) return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
      return {"exp_avg", "exp_avg_sq"};
    case Algorithm::adagrad:
    case Algorithm::rowwise_adagrad: return {"sum"};
    case Algorithm::sgd:
      if (hyper.sgd.momentum != 0.0) return {"momentum_buffer"};
      return {};
  }
  return {};
}

SlotTensors::SlotTensors(std::string name, py::object object, py::dict state, const Hyper& hyper)
    : name_(std::move(name)),
      object_(std::move(object)),
      by_rows_(hyper.by_rows()),
      sparse_only_(hyper.sparse_only),
      state_dict_(std::move(state)) {
  if (!THPVariable_Check(object_.ptr())) {
    throw py::type_error(text("parameter ", name_, " is not a tensor"));
  }
  shard_ = py::reinterpret_borrow<py::object>(local_shard(object_.ptr()));
  if (const auto refused = refusal()) {
    if (gradient_of(THPVariable_Unpack(object_.ptr()).unsafeGetTensorImpl()).defined()) {
      if (refused->is_type_error) throw py::type_error(refused->message);
      throw std::runtime_error(refused->message);
    }
    inert_ = has_state_ = true;
    return;
  }
  dtype_ = *dtype_of(param());
  strides_ = param().strides().vec();
  if (by_rows_ && !param().is_contiguous()) {
    dense_param_ = at::zeros_like(param().detach(), at::MemoryFormat::Contiguous);
  } else if (!param().is_non_overlapping_and_dense() || is_lazy(param())) {
    dense_param_ = dense_like(param());
  }
  take_state(hyper);
  watch_entries(hyper);
}

std::optional<SlotTensors::Refusal> SlotTensors::refusal() const {
  const auto type_error = [this](const auto&... parts) {
    return Refusal{true, text("parameter ", name_, parts...)};
  };
  const auto runtime_error = [this](const auto&... parts) {
    return Refusal{false, text("parameter ", name_, parts...)};
  };
  if (is_wrapper_subclass(param())) {
    return type_error(" is a ", std::string(py::str(py::type::of(object_).attr("__name__"))),
                      ", whose memory the fused step cannot reach; pass plain tensors or DTensors");
  }
  if (param().layout() != at::kStrided) {
    return runtime_error(" is ", param().layout(),
                         "; the fused step takes dense (strided) parameters");
  }
  if (engine_for(param().device()) == EngineKind::none) {
    return runtime_error(" is on ", param().device(),
                         "; this build of recap_fast steps tensors on the CPU",
                         has_cuda_engine() ? " and on CUDA devices"
                                           : " only, having been built without a CUDA toolkit",
                         ": move the model, or use recap_fast.reference or a torch.optim class");
  }
  if (!dtype_of(param())) {
    return type_error(" is ", param().dtype(),
                      "; the fused step takes float32, float64, bfloat16 and float16");
  }
  if (param().is_inference() && !c10::InferenceMode::is_enabled()) {
    return runtime_error(
        " is an inference tensor, which cannot be updated outside inference mode; clone() it");
  }
  if (shard_ && has_pending_sums(object_)) {
    return runtime_error(
        " is a DTensor of pending sums (Partial), each process with a part of every element; "
        "redistribute it");
  }
  if (at::has_internal_overlap(param()) == at::MemOverlap::Yes) {
    return runtime_error(" of shape ", param().sizes(), " and strides ", param().strides(),
                         " has elements that share memory; clone() it");
  }
  return by_rows_ ? refusal_of_rows() : std::nullopt;
}

std::optional<SlotTensors::Refusal> SlotTensors::refusal_of_rows() const {
  if (engine_for(param().device()) == EngineKind::cuda) {
    return Refusal{false, text("parameter ", name_, " is on ", param().device(),
                               ", where FusedRowwiseAdagrad and lazy=True do not run; fuse the "
                               "table on FBGEMM (recap_fast.embeddings.fuse_embeddings), or move "
                               "it to the CPU")};
  }
  if (!shard_) return std::nullopt;
  for (const py::handle placement : object_.attr("placements")) {
    if (placement.attr("is_replicate")().cast<bool>()) continue;
    if (py::hasattr(placement, "dim") && placement.attr("dim").cast<int64_t>() == 0) continue;
    return Refusal{false, text("parameter ", name_, " is sharded as ",
                               std::string(py::str(object_.attr("placements"))),
                               ", and FusedRowwiseAdagrad and lazy=True need whole rows: shard it "
                               "along dimension 0")};
  }
  return std::nullopt;
}

int64_t SlotTensors::row_size() const {
  const at::Tensor& tensor = param();
  return tensor.dim() == 0 || tensor.size(0) == 0 ? 1 : tensor.numel() / tensor.size(0);
}

void SlotTensors::take_state(const Hyper& hyper) {
  const std::vector<const char*> names = state_names(hyper);
  if (names.empty()) {
    has_state_ = true;
    return;
  }
  if (state_dict_.empty()) return;
  if (hyper.algorithm == Algorithm::sgd &&
      (!state_dict_.contains("momentum_buffer") || state_dict_["momentum_buffer"].is_none())) {
    return;
  }
  const auto entry = [&](const char* key) -> py::object {
    if (!state_dict_.contains(key)) {
      throw py::key_error(
          text("the state of parameter ", name_, " has no '", key,
               "'; was the option that needs it switched on after training began?"));
    }
    const py::object value = state_dict_[key];
    if (!THPVariable_Check(value.ptr())) {
      throw py::type_error(text("the state '", key, "' of parameter ", name_, " is not a tensor"));
    }
    return value;
  };
  const at::Tensor layout = dense_param_.defined() ? dense_param_ : param();
  for (const char* key : names) {
    const py::object object = entry(key);
    const at::Tensor& state = local(object, text("the state '", key, "'"));
    if (is_wrapper_subclass(state)) {
      throw py::type_error(text("the state '", key, "' of parameter ", name_,
                                " is a tensor subclass whose memory the fused step cannot reach"));
    }
    if (hyper.algorithm == Algorithm::rowwise_adagrad) {
      check_row_state(key, state);
      PyObject* const shard = local_shard(object.ptr());
      states_.push_back(shard ? py::reinterpret_borrow<py::object>(shard) : object);
      continue;
    }
    if (state.device() != param().device() || state.scalar_type() != param().scalar_type() ||
        state.sizes() != param().sizes() || state.layout() != at::kStrided) {
      throw std::runtime_error(text("the state '", key, "' of parameter ", name_, " is ",
                                    state.dtype(), " ", state.sizes(), " on ", state.device(),
                                    ", the parameter ", param().dtype(), " ", param().sizes(),
                                    " on ", param().device(), "; they must agree"));
    }
    if (!same_layout(state, layout)) {  // as after loading a checkpoint of a contiguous copy
      if (local_shard(object.ptr())) {
        throw std::runtime_error(text("the local shard of the state '", key, "' of parameter ",
                                      name_, " has the strides ", state.strides(),
                                      ", the parameter's ", layout.strides(), "; they must agree"));
      }
      states_.push_back(
          py::reinterpret_steal<py::object>(THPVariable_Wrap(dense_like(layout).copy_(state))));
      state_dict_[key] = states_.back();
      continue;
    }
    PyObject* const shard = local_shard(object.ptr());
    states_.push_back(shard ? py::reinterpret_borrow<py::object>(shard) : object);
  }
  if (hyper.algorithm != Algorithm::sgd) {
    count_in_tensor();
    step_ = entry("step");
    const at::Tensor& step = step_count();
    if (step.numel() != 1 || step.is_complex() || step.scalar_type() == at::kBool) {
      throw std::runtime_error(text("the state 'step' of parameter ", name_, " is ", step.dtype(),
                                    " ", step.sizes(), " on ", step.device(),
                                    "; it must be one real number"));
    }
    if (step.device().is_cpu()) {
      const double count = step.item().toDouble();
      if (!(count >= 0.0) || count != std::floor(count)) {
        throw py::value_error(text("the state 'step' of parameter ", name_, " is ", count,
                                   "; it must be a whole number of steps, 0 or more"));
      }
    }
  }
  has_state_ = true;
}

// torch.optim.SparseAdam counts in a number, as other classes once did.
void SlotTensors::count_in_tensor() {
  if (!state_dict_.contains("step")) return;
  const py::object step = state_dict_["step"];
  if (!PyLong_CheckExact(step.ptr()) && !PyFloat_CheckExact(step.ptr())) return;
  const at::Tensor counter = at::full({}, step.cast<double>(), at::kFloat);
  state_dict_["step"] = py::reinterpret_steal<py::object>(THPVariable_Wrap(counter));
}

// One number for each row, in the type in which the update is computed.
void SlotTensors::check_row_state(const char* key, const at::Tensor& state) const {
  const int64_t rows = param().dim() == 0 ? 1 : param().size(0);
  const auto dtype = dtype_ == Dtype::float64 ? at::kDouble : at::kFloat;
  if (state.device() == param().device() && state.scalar_type() == dtype &&
      state.sizes() == at::IntArrayRef({rows}) && state.is_contiguous() && !is_lazy(state)) {
    return;
  }
  throw std::runtime_error(text("the state '", key, "' of parameter ", name_, " is ", state.dtype(),
                                " ", state.sizes(), " on ", state.device(), "; for ",
                                param().dtype(), " ", param().sizes(), " it must be ", dtype, " [",
                                rows, "] on ", param().device(), ", one number for each row"));
}

void SlotTensors::watch_entries(const Hyper& hyper) {
  std::vector<const char*> names = state_names(hyper);
  if (hyper.algorithm != Algorithm::sgd) names.push_back("step");
  entries_.clear();
  for (const char* name : names) {
    py::object key = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
    PyObject* const value = PyDict_GetItemWithError(state_dict_.ptr(), key.ptr());
    entries_.emplace_back(std::move(key), py::reinterpret_borrow<py::object>(value));
  }
}

const at::Tensor& SlotTensors::step_count() const {
  static const at::Tensor none;
  return step_ ? THPVariable_Unpack(step_.ptr()) : none;
}

void SlotTensors::set_step_count(const at::Tensor& counter) {
  step_ = py::reinterpret_steal<py::object>(THPVariable_Wrap(counter));
  state_dict_["step"] = step_;
  for (auto& [key, value] : entries_) {
    if (key.equal(py::str("step"))) value = step_;
  }
}

Slot SlotTensors::slot() const {
  Slot slot;
  if (inert_) return slot;
  slot.param = (dense_param_.defined() ? dense_param_ : param()).mutable_data_ptr();
  for (size_t k = 0; k < states_.size(); ++k) {
    slot.state[k] = THPVariable_Unpack(states_[k].ptr()).mutable_data_ptr();
  }
  slot.size = has_state_ ? param().numel() : 0;
  slot.row_size = by_rows_ ? row_size() : 0;
  slot.dtype = dtype_;
  return slot;
}

Probe SlotTensors::probe() const {
  if (inert_) return Probe(object_.ptr());
  std::vector<PyObject*> fixed, entries;
  for (const py::object& state : states_) fixed.push_back(state.ptr());
  if (step_) fixed.push_back(step_.ptr());
  for (const auto& [key, value] : entries_) entries.push_back(value.ptr());
  return Probe(object_.ptr(), shard_.ptr(), fixed, state_dict_.ptr(), entries, !sparse_only_);
}

bool SlotTensors::unchanged() const {
  for (const auto& [key, value] : entries_) {
    if (PyDict_GetItemWithError(state_dict_.ptr(), key.ptr()) != value.ptr()) return false;
  }
  return param().strides() == at::IntArrayRef(strides_);
}

const at::Tensor& SlotTensors::local(const py::object& tensor, const std::string& what) const {
  const py::handle shard = local_shard(tensor.ptr());
  if (!shard && !shard_) return THPVariable_Unpack(tensor.ptr());
  if (!shard || !shard_) {
    throw py::type_error(text(what, " of parameter ", name_, shard ? " is" : " is not",
                              " a DTensor, the parameter", shard_ ? " is" : " is not",
                              "; they must agree"));
  }
  if (!sharded_alike(object_, tensor)) {
    throw std::runtime_error(
        text(what, " of parameter ", name_, " is sharded as ",
             std::string(py::str(spec_of(tensor.ptr()))), ", the parameter as ",
             std::string(py::str(spec_of(object_.ptr()))), "; they must agree: redistribute it"));
  }
  return THPVariable_Unpack(shard.ptr());
}

at::Tensor SlotTensors::grad() const {
  const at::Tensor& grad = gradient_of(THPVariable_Unpack(object_.ptr()).unsafeGetTensorImpl());
  if (!shard_) return grad;
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  return THPVariable_Unpack(local_shard(object.ptr()));
}

const void* SlotTensors::gradient(const at::Tensor& whole, bool& needs_copy) {
  auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(whole));
  if (shard_ && local_shard(object.ptr()) && !sharded_alike(object_, object)) {
    object = object.attr("redistribute")(object_.attr("device_mesh"), object_.attr("placements"));
    // Or a process that reads it again, for a plan of its own that must be rebuilt, would wait for
    // those that do not.
    object_.attr("grad") = object;
  }
  const at::Tensor& grad = local(object, "the gradient");
  if (sparse_only_) {
    throw std::runtime_error(text("parameter ", name_,
                                  " has a dense gradient, and SparseAdam takes sparse ones only: "
                                  "build the layer with sparse=True, or use FusedAdam"));
  }
  if (is_wrapper_subclass(grad)) {
    throw py::type_error(text("the gradient of parameter ", name_,
                              " is a tensor subclass whose memory the fused step cannot reach"));
  }
  if (grad.dtype() != param().dtype() || grad.device() != param().device() ||
      grad.sizes() != param().sizes()) {
    throw std::runtime_error(text("the gradient of parameter ", name_, " is ", grad.dtype(), " ",
                                  grad.sizes(), " on ", grad.device(), ", the parameter ",
                                  param().dtype(), " ", param().sizes(), " on ", param().device(),
                                  "; they must agree"));
  }
  static const char empty = 0;
  if (grad.numel() == 0) return &empty;  // no memory, but a gradient all the same
  if (!dense_param_.defined() && !is_lazy(grad) && same_layout(grad, param())) {
    return grad.const_data_ptr();
  }
  if (!dense_grad_.defined()) {
    dense_grad_ = dense_like(dense_param_.defined() ? dense_param_ : param());
  }
  needs_copy = true;
  return dense_grad_.const_data_ptr();
}

void SlotTensors::copy_in() {
  // The copies belong to the stream on which they were made.
  if (engine_for(param().device()) == EngineKind::cuda) {
    if (dense_param_.defined()) keep_for_current_stream(dense_param_);
    if (dense_grad_.defined()) keep_for_current_stream(dense_grad_);
  }
  if (dense_param_.defined()) dense_param_.copy_(param().detach());
  if (dense_grad_.defined()) dense_grad_.copy_(grad().detach());
}

void SlotTensors::copy_out() {
  if (dense_param_.defined()) param().detach().copy_(dense_param_);
}

}  // namespace recap
