// The items of a dict as they were when a plan was built, so that each step can tell, for a few
// nanoseconds an item, that nobody has replaced one since.
#pragma once

#include <utility>
#include <vector>

#include "python.h"

namespace recap {

class DictSnapshot {
 public:
  DictSnapshot() = default;
  explicit DictSnapshot(py::dict dict) : dict_(std::move(dict)) {
    for (auto item : dict_) {
      items_.emplace_back(py::reinterpret_borrow<py::object>(item.first),
                          py::reinterpret_borrow<py::object>(item.second));
    }
  }

  // Compares identities, not values: a tensor or list changed in place is still the same item.
  bool unchanged() const {
    if (!dict_) return true;
    if (static_cast<size_t>(PyDict_GET_SIZE(dict_.ptr())) != items_.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& item : items_) {
      if (!PyDict_Next(dict_.ptr(), &position, &key, &value)) return false;
      if (key != item.first.ptr() || value != item.second.ptr()) return false;
    }
    return true;
  }

 private:
  py::dict dict_ = py::reinterpret_steal<py::dict>(nullptr);
  // Owned, so that the address of a dropped item cannot come back as another object.
  std::vector<std::pair<py::object, py::object>> items_;
};

}  // namespace recap
