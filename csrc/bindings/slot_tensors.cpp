#include "slot_tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <sstream>

#include "../cuda/engine.h"
#include "devices.h"
#include "mapping.h"

namespace recap {
namespace {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::optional<Dtype> dtype_of(const at::Tensor& tensor) {
  return recap::dtype_of(tensor.scalar_type());
}

// A dense tensor of `like`'s shape: its own strides if it is dense, else those torch would choose.
at::Tensor dense_like(const at::Tensor& like, at::ScalarType type) {
  return at::zeros_like(like.detach(), like.options().dtype(type), at::MemoryFormat::Preserve);
}
at::Tensor dense_like(const at::Tensor& like) { return dense_like(like, like.scalar_type()); }

// Whether a state of that type can be converted to another such.
bool is_state_type(at::ScalarType type) { return recap::dtype_of(type) || type == at::kShort; }

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

// How many bytes its storage must have.
int64_t bytes_needed(const at::Tensor& tensor) {
  if (tensor.numel() == 0 || tensor._is_zerotensor()) return 0;
  int64_t elements = tensor.storage_offset() + 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return elements * static_cast<int64_t>(tensor.element_size());
}

std::string memory_of(const at::Tensor& tensor) {
  return text(" has no memory: its storage was resized to ", tensor.storage().nbytes(),
              " bytes, and it needs ", bytes_needed(tensor),
              "; give it back before the step, or set the gradient to None");
}

}  // namespace

bool is_freed(const at::Tensor& tensor) {
  const int64_t needed = bytes_needed(tensor);
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  return needed > 0 && static_cast<int64_t>(storage.nbytes()) < needed;
}

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

SlotTensors::SlotTensors(std::string name, py::object object, py::object state, const Hyper& hyper,
                         const FormatOptions& formats)
    : name_(std::move(name)),
      object_(std::move(object)),
      by_rows_(hyper.by_rows()),
      sparse_only_(hyper.sparse_only),
      formats_(formats),
      state_(std::move(state)) {
  if (!THPVariable_Check(object_.ptr())) {
    throw py::type_error(text("parameter ", name_, " is not a tensor"));
  }
  shard_ = py::reinterpret_borrow<py::object>(local_shard(object_.ptr()));
  if (const auto refused = refusal()) {
    if (has_gradient()) {
      if (refused->is_type_error) throw py::type_error(refused->message);
      throw std::runtime_error(refused->message);
    }
    make_inert();
    return;
  }
  dtype_ = *dtype_of(param());
  make_format(hyper);
  sizes_ = param().sizes().vec();
  strides_ = param().strides().vec();
  if (by_rows_ && !param().is_contiguous()) {
    dense_param_ = at::zeros_like(param().detach(), at::MemoryFormat::Contiguous);
  } else if (!param().is_non_overlapping_and_dense() || is_lazy(param()) || !is_aligned(param())) {
    dense_param_ = dense_like(param());
  }
  try {
    take_state(hyper);
  } catch (const std::runtime_error&) {  // its own, by name: others' errors are of other classes
    if (has_gradient()) throw;
    make_inert();  // no step looks at the state of a parameter without a gradient, in torch too
    return;
  }
  watch_entries(hyper);
}

bool SlotTensors::has_gradient() const {
  return gradient_of(THPVariable_Unpack(object_.ptr()).unsafeGetTensorImpl()).defined();
}

void SlotTensors::make_inert() {
  inert_ = has_state_ = true;
  states_.clear();
  replacements_.clear();
  step_ = {};
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
                         cuda::has_engine() ? " and on CUDA devices"
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
  if (is_freed(param())) return runtime_error(memory_of(param()));
  if (auto refused = refusal_of_formats()) return refused;
  return by_rows_ ? refusal_of_rows() : std::nullopt;
}

std::optional<SlotTensors::Refusal> SlotTensors::refusal_of_formats() const {
  const bool is_double = param().scalar_type() == at::kDouble;
  if (is_double && formats_.state.value_or(Dtype::float64) != Dtype::float64) {
    return Refusal{true,
                   text("parameter ", name_, " is float64, whose states are float64 too, with ",
                        "state_dtype=", dtype_name(*formats_.state),
                        "; leave state_dtype at None in its param group. Parameters of "
                        "float32, bfloat16 and float16 take all of these")};
  }
  if (!is_double && formats_.state == Dtype::float64) {
    return Refusal{true,
                   text("parameter ", name_, " is ", param().dtype(),
                        ", with state_dtype=float64; it takes float32, bfloat16 and float16")};
  }
  if (is_double && formats_.eight_bits) {
    return Refusal{true,
                   text("parameter ", name_, " is float64, whose states are float64 too, with ",
                        "state_dtype='8bit'; leave state_dtype at None in its param group. "
                        "Parameters of float32, bfloat16 and float16 take it")};
  }
  if (is_double || !formats_.of(*dtype_of(param()), *dtype_of(param()), true, true, name_)) {
    return std::nullopt;
  }
  if (formats_.eight_bits && shard_) {
    return Refusal{true, text("parameter ", name_,
                              " is a DTensor, whose states cannot be of 8 bits, since blocks would "
                              "not end where shards do; set state_dtype to torch.bfloat16")};
  }
  if (by_rows_ || sparse_only_) {
    return Refusal{false, text("parameter ", name_,
                               " is updated by rows, which takes no "
                               "state_dtype, master_weights or stochastic_rounding; leave them "
                               "out of its param group")};
  }
  return std::nullopt;
}

// The dtype of gradients is that of the one there is.
void SlotTensors::make_format(const Hyper& hyper) {
  const at::Tensor& grad = gradient_of(THPVariable_Unpack(object_.ptr()).unsafeGetTensorImpl());
  Dtype grad_type = dtype_;
  if (grad.defined() && grad.layout() == at::kStrided && needs_other_format(grad)) {
    grad_type = *dtype_of(grad);
  }
  const bool takes_codes = param().is_contiguous() && param().numel() >= kFewestWithCodes;
  const auto format =
      formats_.of(dtype_, grad_type, hyper.state_names().count > 0, takes_codes, name_);
  if (!format) return;
  format_ = std::make_unique<Format>(*format);
  format_->first_element = first_element();
}

bool SlotTensors::needs_other_format(const at::Tensor& grad) const {
  const auto type = dtype_of(grad);
  const bool is_possible = type && type != Dtype::float64 && dtype_ != Dtype::float64 &&
                           !by_rows_ && !sparse_only_ && grad.layout() == at::kStrided;
  return is_possible && *type != (format_ ? format_->grad : dtype_);
}

// Of a DTensor's shard along the first dimension, which is a part of the whole; of others that are
// not, their first element at least.
int64_t SlotTensors::first_element() const {
  if (!shard_) return 0;
  const py::object found =
      py::module_::import("torch.distributed.tensor._utils")
          .attr("compute_local_shape_and_global_offset")(
              object_.attr("shape"), object_.attr("device_mesh"), object_.attr("placements"));
  const auto offsets = found[py::int_(1)].cast<std::vector<int64_t>>();
  const auto sizes = object_.attr("shape").cast<std::vector<int64_t>>();
  int64_t first = 0;
  for (size_t dim = 0; dim < sizes.size(); ++dim) first = first * sizes[dim] + offsets.at(dim);
  return first;
}

bool SlotTensors::counts(const Hyper& hyper) const {
  return hyper.counts() || (format_ && format_->draws());
}

std::vector<const char*> SlotTensors::state_names(const Hyper& hyper) const {
  const StateNames names = hyper.state_names();
  std::vector<const char*> all(names.begin(), names.end());
  if (format_ && rest_name(*format_)) all.push_back(rest_name(*format_));
  if (format_ && format_->has_codes) {
    for (const char* name : names) all.push_back(scale_name(name));
  }
  return all;
}

at::ScalarType SlotTensors::state_type(size_t index, const Hyper& hyper) const {
  if (!format_) return param().scalar_type();
  const auto states = static_cast<size_t>(hyper.state_names().count);
  if (index < states) return format_->has_codes ? at::kByte : scalar_type_of(format_->state);
  const bool is_rest = index == states && rest_name(*format_);
  return is_rest ? rest_type(*format_) : at::kFloat;
}

bool SlotTensors::is_scale(size_t index, const Hyper& hyper) const {
  if (!format_ || !format_->has_codes) return false;
  return index >= static_cast<size_t>(hyper.state_names().count) + (rest_name(*format_) != nullptr);
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
  if (names.empty() && !counts(hyper)) {
    has_state_ = true;
    return;
  }
  const Py_ssize_t size = PyObject_Size(state_.ptr());
  if (size < 0) throw py::error_already_set();
  if (size == 0) return;
  if (hyper.algorithm == Algorithm::sgd && hyper.state_names().count) {
    const py::object buffer = item_of(state_, "momentum_buffer");
    if (!buffer || buffer.is_none()) return;
  }
  const auto entry = [&](const char* key) -> py::object {
    py::object value = item_of(state_, key);
    if (!value) {
      throw py::key_error(
          text("the state of parameter ", name_, " has no '", key,
               "'; was the option that needs it switched on after training began?"));
    }
    if (!THPVariable_Check(value.ptr())) {
      throw py::type_error(text("the state '", key, "' of parameter ", name_, " is not a tensor"));
    }
    return value;
  };
  const at::Tensor layout = dense_param_.defined() ? dense_param_ : param();
  for (const char* key : names) {
    const at::ScalarType type = state_type(states_.size(), hyper);
    const py::object object = entry(key);
    const at::Tensor& state = local(object, text("the state '", key, "'"));
    if (is_wrapper_subclass(state)) {
      throw py::type_error(text("the state '", key, "' of parameter ", name_,
                                " is a tensor subclass whose memory the fused step cannot reach"));
    }
    const bool by_number_of_rows = hyper.algorithm == Algorithm::rowwise_adagrad;
    const bool is_scale = this->is_scale(states_.size(), hyper);
    if (by_number_of_rows) {
      check_numbers(key, state, param().dim() == 0 ? 1 : param().size(0), "row");
    } else if (is_scale) {
      check_numbers(key, state, scale_count(param().numel()), "block of 128 elements");
    } else if ((type == at::kByte) != (state.scalar_type() == at::kByte)) {
      throw std::runtime_error(
          text("the state '", key, "' of parameter ", name_, " is ", state.dtype(),
               ", and its param group asks for ", c10::scalarTypeToTypeMeta(type), " (state_dtype ",
               formats_.eight_bits ? "is" : "is not", " '8bit'): to convert it, load the state ",
               "dict into an optimizer that was made with that state_dtype"));
    } else if (state.device() != param().device() ||
               (!formats_.are_given && state.scalar_type() != type) ||
               !(is_state_type(state.scalar_type()) || type == at::kByte) ||
               state.sizes() != param().sizes() || state.layout() != at::kStrided) {
      throw std::runtime_error(text("the state '", key, "' of parameter ", name_, " is ",
                                    state.dtype(), " ", state.sizes(), " on ", state.device(),
                                    ", the parameter ", param().dtype(), " ", param().sizes(),
                                    " on ", param().device(), "; they must agree"));
    }
    if (is_freed(state)) {
      throw std::runtime_error(
          text("the state '", key, "' of parameter ", name_, memory_of(state)));
    }
    // As after loading a checkpoint of a contiguous copy, or one mapped from a file.
    const bool is_checked = by_number_of_rows || is_scale;
    const at::Tensor& wanted = is_checked ? state : layout;
    const bool is_of_type = is_checked || state.scalar_type() == type;
    if (!is_of_type || !same_layout(state, wanted) || is_lazy(state) || !is_aligned(state)) {
      if (local_shard(object.ptr())) {
        throw std::runtime_error(text("the local shard of the state '", key, "' of parameter ",
                                      name_, " has the strides ", state.strides(),
                                      ", the parameter's ", layout.strides(), "; they must agree"));
      }
      const at::Tensor copy = is_checked ? dense_like(wanted) : dense_like(wanted, type);
      states_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(copy)));
      replacements_.push_back({key, object, states_.back()});
      continue;
    }
    PyObject* const shard = local_shard(object.ptr());
    states_.push_back(shard ? py::reinterpret_borrow<py::object>(shard) : object);
  }
  if (counts(hyper)) {
    step_ = counted_in_tensor(item_of(state_, "step"));
    if (!step_) step_ = entry("step");
    const at::Tensor& step = step_count();
    if (step.numel() != 1 || step.is_complex() || step.scalar_type() == at::kBool) {
      throw std::runtime_error(text("the state 'step' of parameter ", name_, " is ", step.dtype(),
                                    " ", step.sizes(), " on ", step.device(),
                                    "; it must be one real number"));
    }
    if (is_freed(step)) {
      throw std::runtime_error(text("the state 'step' of parameter ", name_, memory_of(step)));
    }
    if (step.device().is_cpu()) {
      const double count = step.item().toDouble();
      if (!is_step_count(count)) throw py::value_error(wrong_step_count(count));
    }
  }
  has_state_ = true;
  algorithm_states_ = std::min<size_t>(hyper.state_names().count, states_.size());
  for (const py::object& object : states_) {
    const at::Tensor& state = THPVariable_Unpack(object.ptr());
    state_geometry_.emplace_back(state.sizes().vec(), state.strides().vec());
  }
}

// torch.optim.SparseAdam counts in a number, as other classes once did. Null: this one does not.
py::object SlotTensors::counted_in_tensor(py::object step) {
  if (!step || (!PyLong_CheckExact(step.ptr()) && !PyFloat_CheckExact(step.ptr()))) return {};
  const at::Tensor counter = at::full({}, step.cast<double>(), at::kFloat);
  auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(counter));
  replacements_.push_back({"step", std::move(step), tensor});
  return tensor;
}

// One number for each of some parts, in the type in which the update is computed.
void SlotTensors::check_numbers(const char* key, const at::Tensor& state, int64_t count,
                                const char* part) const {
  const auto dtype = dtype_ == Dtype::float64 ? at::kDouble : at::kFloat;
  if (state.device() == param().device() && state.scalar_type() == dtype &&
      state.sizes() == at::IntArrayRef({count}) && state.is_contiguous() && !is_lazy(state)) {
    return;
  }
  throw std::runtime_error(text("the state '", key, "' of parameter ", name_, " is ", state.dtype(),
                                " ", state.sizes(), " on ", state.device(), "; for ",
                                param().dtype(), " ", param().sizes(), " it must be ", dtype, " [",
                                count, "] on ", param().device(), ", one number for each ", part));
}

void SlotTensors::watch_entries(const Hyper& hyper) {
  std::vector<const char*> names = state_names(hyper);
  if (counts(hyper)) names.push_back("step");
  entries_.clear();
  for (const char* name : names) {
    py::object key = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
    py::object value = item_of(state_, key);
    entries_.emplace_back(std::move(key), std::move(value));
  }
}

std::string SlotTensors::wrong_step_count(double count) const {
  return text("the state 'step' of parameter ", name_, " is ", count,
              "; it must be a whole number of steps, 0 or more");
}

const at::Tensor& SlotTensors::step_count() const {
  static const at::Tensor none;
  return step_ ? THPVariable_Unpack(step_.ptr()) : none;
}

void SlotTensors::adopt() {
  for (const auto& [key, former, tensor] : replacements_) {
    if (THPVariable_Check(former.ptr())) {
      at::Tensor copy = THPVariable_Unpack(tensor.ptr());
      copy.copy_(THPVariable_Unpack(former.ptr()).detach());
    }
    replace_entry(key, tensor);
  }
  replacements_.clear();
}

void SlotTensors::set_step_count(const at::Tensor& counter) {
  step_ = py::reinterpret_steal<py::object>(THPVariable_Wrap(counter));
  replace_entry("step", step_);
}

void SlotTensors::replace_entry(const char* key, const py::object& value) {
  set_item(state_, key, value);
  for (auto& [name, held] : entries_) {
    if (name.equal(py::str(key))) held = value;
  }
}

Slot SlotTensors::slot() const {
  Slot slot;
  if (inert_) return slot;
  slot.param = (dense_param_.defined() ? dense_param_ : param()).mutable_data_ptr();
  for (size_t k = 0; k < states_.size(); ++k) {
    void** const held = k < algorithm_states_ ? &slot.state[k] : held_by_format(k);
    *held = THPVariable_Unpack(states_[k].ptr()).mutable_data_ptr();
  }
  slot.size = has_state_ ? param().numel() : 0;
  slot.row_size = by_rows_ ? row_size() : 0;
  slot.dtype = dtype_;
  slot.format = format_.get();
  return slot;
}

// Where the format has the address of a state that is not the algorithm's.
void** SlotTensors::held_by_format(size_t k) const {
  const size_t place = k - algorithm_states_, rests = rest_name(*format_) != nullptr;
  return place < rests ? &format_->rest : &format_->scale[place - rests];
}

Probe SlotTensors::probe(std::vector<std::shared_ptr<StateBlock>>& blocks) const {
  if (inert_) return Probe(object_.ptr());
  std::vector<PyObject*> fixed, entries;
  for (const py::object& state : states_) fixed.push_back(state.ptr());
  const bool is_probed_whole = fixed.size() + (step_ ? 1 : 0) <= kMaxProbed;
  // `unchanged` looks at what the format holds.
  if (!is_probed_whole) fixed.resize(std::min(fixed.size(), algorithm_states_));
  for (const auto& [key, value] : entries_) entries.push_back(value.ptr());
  PyObject* const dict = PyDict_Check(state_.ptr()) ? state_.ptr() : nullptr;
  const auto like_param = [this](const auto& geometry) { return geometry.first == sizes_; };
  const bool alike = std::all_of(state_geometry_.begin(), state_geometry_.end(), like_param);
  const at::ScalarType grad_type = scalar_type_of(format_ ? format_->grad : dtype_);
  return Probe(object_.ptr(), shard_.ptr(), fixed, step_.ptr(), dict, entries, grad_type,
               !sparse_only_ && !dense_param_.defined(), alike && is_probed_whole, blocks);
}

bool SlotTensors::unchanged() const {
  for (const auto& [key, value] : entries_) {
    if (!item_of(state_, key).is(value)) return false;
  }
  for (size_t k = 0; k < states_.size(); ++k) {
    const at::Tensor& state = THPVariable_Unpack(states_[k].ptr());
    const auto& [sizes, strides] = state_geometry_[k];
    if (k >= algorithm_states_ && state.const_data_ptr() != *held_by_format(k)) return false;
    if (state.sizes() != at::IntArrayRef(sizes) || state.strides() != at::IntArrayRef(strides)) {
      return false;
    }
  }
  return param().sizes() == at::IntArrayRef(sizes_) &&
         param().strides() == at::IntArrayRef(strides_);
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
  const at::ScalarType type = format_ ? scalar_type_of(format_->grad) : param().scalar_type();
  if (grad.scalar_type() != type || grad.device() != param().device() ||
      grad.sizes() != param().sizes()) {
    throw std::runtime_error(text("the gradient of parameter ", name_, " is ", grad.dtype(), " ",
                                  grad.sizes(), " on ", grad.device(), ", the parameter ",
                                  param().dtype(), " ", param().sizes(), " on ", param().device(),
                                  "; they must agree"));
  }
  static const char empty = 0;
  if (grad.numel() == 0) return &empty;  // no memory, but a gradient all the same
  if (is_freed(grad)) {
    throw std::runtime_error(text("the gradient of parameter ", name_, memory_of(grad)));
  }
  if (!dense_param_.defined() && !is_lazy(grad) && same_layout(grad, param()) && is_aligned(grad)) {
    return grad.const_data_ptr();
  }
  if (!dense_grad_.defined()) {
    dense_grad_ = dense_like(dense_param_.defined() ? dense_param_ : param(), type);
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
  if (!dense_grad_.defined()) return;
  const at::Tensor gradient = grad().detach();  // a sparse one is not copied
  if (gradient.layout() == at::kStrided) dense_grad_.copy_(gradient);
}

void SlotTensors::copy_out() {
  if (dense_param_.defined()) param().detach().copy_(dense_param_);
}

}  // namespace recap
