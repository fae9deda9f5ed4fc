// The state of slots that had none before this step: made beforehand, and put into the optimizers'
// dicts by the step itself, so that it is there if the step was taken and only then.
#pragma once

#include <utility>
#include <vector>

#include "python.h"

namespace recap {

// The state of one slot, as Python hands it over.
struct NewState {
  size_t slot;             // its flat index
  py::dict entries;        // by their names
  bool is_first;           // whether a momentum buffer is new
  py::object left_behind;  // the state of another optimizer, which had the entries; or None
};

class NewStates {
 public:
  // Takes the state of `param`, whose optimizer's state is `states`. Returns the dict in which it
  // is until `put`.
  py::dict add(const NewState& made, const py::dict& states, const py::object& param);

  bool empty() const { return staged_.empty(); }

  // Puts all of them where they belong, or raises an error and puts none.
  void put();
  // Undoes it.
  void take_back();
  // After a step that was taken: other optimizers lose what was theirs. What interrupts that is
  // raised when it is done.
  void finish();

  // For each slot, calls `function(slot, dict)` with the dict that its state is in after `put`.
  template <typename Function>
  void each_put(Function&& function) const {
    for (const Staged& staged : staged_) {
      function(staged.slot, staged.present ? staged.present : staged.dict);
    }
  }

  template <typename Visit>
  void each_reference(Visit&& visit) const {
    for (const Staged& staged : staged_) {
      visit(staged.states);
      visit(staged.param);
      visit(staged.dict);
      visit(staged.present);
      visit(staged.left_behind);
      for (const auto& [key, value] : staged.before) {
        visit(key);
        visit(value);
      }
    }
    for (const auto& [states, added] : added_) {
      visit(states);
      visit(added);
    }
  }

 private:
  struct Staged {
    size_t slot;
    py::dict states;
    py::object param;
    py::dict dict;       // all of its state
    py::object present;  // what the optimizer had of it already: a mapping; null: nothing
    py::object left_behind;
    std::vector<std::pair<py::object, py::object>> before;  // entries of `present`, null: none
  };

  std::vector<Staged> staged_;
  // By optimizer, the states of parameters that had none. To update a dict with another runs no
  // Python, and so cannot be interrupted half way: the hashes of tensors are known there.
  std::vector<std::pair<py::dict, py::dict>> added_;
  size_t updated_ = 0;  // of `staged_`, how many have been looked at by `put`
};

}  // namespace recap
