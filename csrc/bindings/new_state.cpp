#include "new_state.h"

#include <optional>

#include "mapping.h"

namespace recap {
namespace {

// To hash a tensor runs Python, in which a signal may raise: not here, and at the latest when the
// caller is done. Returns whether it was deleted; an interrupt is kept in `interrupted`.
void delete_item(const py::object& mapping, const py::object& key,
                 std::optional<py::error_already_set>& interrupted) {
  constexpr int kAttempts = 100;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (PyObject_DelItem(mapping.ptr(), key.ptr()) == 0) return;
    py::error_already_set error;
    if (error.matches(PyExc_KeyError)) return;
    if (!interrupted) interrupted.emplace(std::move(error));
  }
}

}  // namespace

py::dict NewStates::add(const NewState& made, const py::dict& states, const py::object& param) {
  Staged staged = {made.slot, states, param, py::dict(), {}, made.left_behind, {}};
  staged.present = item_of(states, param);
  if (staged.present && PyDict_Update(staged.dict.ptr(), staged.present.ptr()) < 0) {
    throw py::error_already_set();
  }
  for (const auto& [key, value] : made.entries) {
    staged.dict[key] = value;
    if (!staged.present) continue;
    auto name = py::reinterpret_borrow<py::object>(key);
    py::object before = item_of(staged.present, name);
    staged.before.emplace_back(std::move(name), std::move(before));
  }
  if (!staged.present) {
    auto same = added_.begin();
    while (same != added_.end() && !same->first.is(states)) ++same;
    if (same == added_.end()) same = added_.emplace(same, states, py::dict());
    same->second[param] = staged.dict;
  }
  staged_.push_back(std::move(staged));
  return staged_.back().dict;
}

void NewStates::put() {
  try {
    for (updated_ = 0; updated_ < staged_.size();) {
      const Staged& staged = staged_[updated_++];
      for (const auto& [name, value] : staged.before) {
        set_item(staged.present, name, item_of(staged.dict, name));
      }
    }
    for (const auto& [states, added] : added_) {
      if (PyDict_Update(states.ptr(), added.ptr()) < 0) throw py::error_already_set();
    }
  } catch (...) {
    take_back();
    throw;
  }
}

void NewStates::take_back() {
  std::optional<py::error_already_set> interrupted;  // there is an error already
  for (size_t i = 0; i < updated_; ++i) {
    const Staged& staged = staged_[i];
    for (const auto& [name, value] : staged.before) {
      if (value) {
        set_item(staged.present, name, value);
      } else {
        delete_item(staged.present, name, interrupted);
      }
    }
  }
  updated_ = 0;
  for (const auto& [states, added] : added_) {
    for (const auto& [param, state] : added) {
      delete_item(states, py::reinterpret_borrow<py::object>(param), interrupted);
    }
  }
}

void NewStates::finish() {
  std::optional<py::error_already_set> interrupted;
  for (const Staged& staged : staged_) {
    if (!staged.left_behind.is_none()) {
      delete_item(staged.left_behind, staged.param, interrupted);
    }
  }
  staged_.clear();
  added_.clear();
  updated_ = 0;
  if (interrupted) throw std::move(*interrupted);
}

}  // namespace recap
