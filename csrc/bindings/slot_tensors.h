// The torch side of one slot: the parameter, its state and its gradient, and what must hold of them
// before an engine may touch their memory.
#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "format_options.h"
#include "probe.h"
#include "python.h"
#include "snapshot.h"

namespace recap {

// Whether its memory was given up, as sharded training does by storage().resize_(0).
bool is_freed(const at::Tensor& tensor);

// Whether elements lie at multiples of their size, as the processor's own types must.
bool is_aligned(const at::Tensor& tensor);

class SlotTensors {
 public:
  // `state` is the mapping with the parameter's state, nearly always a dict; an empty one means
  // that the state is still to be made. Raises an error naming the parameter if it has a gradient
  // and is one that no engine can step. Changes nothing that is the user's.
  SlotTensors(std::string name, py::object param, py::object state, const Hyper& hyper,
              const FormatOptions& formats);

  const std::string& name() const { return name_; }
  // What this process holds of the parameter.
  const at::Tensor& param() const { return THPVariable_Unpack((shard_ ? shard_ : object_).ptr()); }
  // Whether no engine can step the parameter, which without a gradient does no harm.
  bool is_inert() const { return inert_; }
  bool is_dtensor() const { return shard_.ptr() != nullptr; }
  // Whether the engine steps a copy of it, in order, since its own memory is not.
  bool copies_param() const { return dense_param_.defined(); }
  bool has_state() const { return has_state_; }
  const at::Tensor& step_count() const;                   // undefined if it is not counted
  const Format* format() const { return format_.get(); }  // null: all is stored alike

  // Whether a gradient is of another dtype than the plan was made for, and one that another plan
  // could be made for.
  bool needs_other_format(const at::Tensor& grad) const;

  // Whether a step count is one, and what an error says of one that is not.
  static bool is_step_count(double count) {
    // From 2^52 on, all numbers are whole.
    return count >= 0x1p52
               ? count <= std::numeric_limits<double>::max()
               : count >= 0.0 && static_cast<double>(static_cast<int64_t>(count)) == count;
  }
  std::string wrong_step_count(double count) const;

  // Has the mapping hold what the engine steps: a copy of a state that is laid out otherwise than
  // the parameter, and a tensor for a step count that is a number.
  void adopt();

  // Makes `counter` the step count, in the mapping too.
  void set_step_count(const at::Tensor& counter);

  // The same entries are in another mapping from now on.
  void move_state(py::object state) { state_ = std::move(state); }

  // The addresses for the plan, and the words that each step compares.
  Slot slot() const;
  // Adds the blocks that hold its states to `blocks`.
  Probe probe(std::vector<std::shared_ptr<StateBlock>>& blocks) const;

  // Whether sizes, strides and the entries of the state are as they were: what a probe leaves open
  // for a slot that is not usual.
  bool unchanged() const;

  // The address of a gradient that is not plain, in the parameter's memory order. Raises an error
  // naming the parameter if the gradient does not fit it. `needs_copy` is set if the address is
  // that of a buffer which `copy_in` fills. A DTensor that is sharded otherwise than the parameter
  // is redistributed, as torch does, and then replaced.
  const void* gradient(const at::Tensor& grad, bool& needs_copy);

  // What this process holds of the gradient, which `gradient` has accepted.
  at::Tensor grad() const;

  // Elements of a row, an index of the first dimension.
  int64_t row_size() const;

  // For a parameter with gaps in memory, a gradient laid out otherwise than its parameter, or one
  // of them at an address that is no multiple of an element: fill the dense copies before the
  // engine runs, and write the parameter back after it.
  void copy_in();
  void copy_out();

  // Every Python object that this one owns.
  template <typename Visit>
  void each_reference(Visit&& visit) const {
    visit(object_);
    visit(shard_);
    visit(state_);
    visit(step_);
    for (const auto& [key, value] : entries_) {
      visit(key);
      visit(value);
    }
    for (const py::object& state : states_) visit(state);
    for (const Replacement& each : replacements_) {
      visit(each.former);
      visit(each.tensor);
    }
  }

 private:
  struct Refusal {
    bool is_type_error;
    std::string message;
  };
  // Of an entry of the mapping, by a tensor that takes the former's values.
  struct Replacement {
    const char* key;
    py::object former, tensor;
  };
  std::optional<Refusal> refusal() const;  // why no engine can step the parameter
  std::optional<Refusal> refusal_of_rows() const;
  std::optional<Refusal> refusal_of_formats() const;
  bool has_gradient() const;
  void make_inert();
  void make_format(const Hyper& hyper);
  int64_t first_element() const;
  bool counts(const Hyper& hyper) const;
  std::vector<const char*> state_names(const Hyper& hyper) const;  // and those of the format
  at::ScalarType state_type(size_t index, const Hyper& hyper) const;
  bool is_scale(size_t index, const Hyper& hyper) const;
  void** held_by_format(size_t k) const;
  void take_state(const Hyper& hyper);
  py::object counted_in_tensor(py::object step);
  void replace_entry(const char* key, const py::object& value);
  void check_numbers(const char* key, const at::Tensor& state, int64_t count,
                     const char* part) const;
  void watch_entries(const Hyper& hyper);
  // The local shard of a DTensor that is sharded like the parameter, or a tensor that is none, like
  // the parameter.
  const at::Tensor& local(const py::object& tensor, const std::string& what) const;

  std::string name_;
  // Parameter and states are held as Python objects alone: torch.utils.swap_tensors, and with it
  // Module.to(), insists on the only reference to the tensor behind one.
  py::object object_;
  py::object shard_;  // the local one, if the parameter is a DTensor
  bool inert_ = false;
  bool by_rows_ = false;  // is updated by rows, which lie one after the other
  bool sparse_only_ = false;
  Dtype dtype_ = Dtype::float32;
  FormatOptions formats_;
  std::unique_ptr<Format> format_;  // at an address that stays
  std::vector<int64_t> sizes_, strides_;

  py::object state_;
  // The entries that the algorithm has, and their values, null for one that is not there. What else
  // is in the mapping may change as it likes.
  std::vector<std::pair<py::object, py::object>> entries_;
  bool has_state_ = false;
  std::vector<py::object> states_;  // of a DTensor its local shard
  size_t algorithm_states_ = 0;     // of these; then come the rest and the scales, if there are any
  std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> state_geometry_;
  py::object step_;
  std::vector<Replacement> replacements_;

  // Defined only for a parameter with gaps, with rows that have some, or not aligned.
  at::Tensor dense_param_;
  at::Tensor dense_grad_;  // made when first needed
};

}  // namespace recap
