// The items of a dict or list as they were when a plan was built, so that each step can tell, for a
// few nanoseconds an item, that nobody has replaced one since. Identities are compared, not values:
// a tensor or list changed in place is still the same item.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "python.h"

namespace recap {

// Python's own mark of a dict (PEP 509): no two states of any dicts have the same, so that with an
// equal one all items are as they were. From Python 3.12 on it is deprecated: items are compared.
class DictVersion {
 public:
  DictVersion() = default;

#if PY_VERSION_HEX < 0x030C0000
  explicit DictVersion(PyObject* dict)
      : tag_(reinterpret_cast<PyDictObject*>(dict)->ma_version_tag) {}

  bool is_of(PyObject* dict) const {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag == tag_;
  }
#else
  explicit DictVersion(PyObject*) {}

  bool is_of(PyObject*) const { return false; }
#endif

 private:
  uint64_t tag_ = 0;  // of no dict
};

// Where a dict keeps its items, one after the other, to compare them there: to ask Python for each
// takes several times as long. CPython promises no place, so that it is looked for. From 3.11 on, a
// dict whose keys are all strings has pairs of key and value in the memory of its keys, behind a
// table whose size is at its beginning.
class DictItems {
 public:
  struct Item {
    PyObject *key, *value;
  };

  DictItems() = default;
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030F0000
  explicit DictItems(PyObject* dict)
      : keys_(memory(dict)), count_(PyDict_GET_SIZE(dict)), shape_(shape(keys_)) {
    std::vector<Item> items;
    Item item;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &item.key, &item.value);) {
      items.push_back(item);
    }
    auto* const type = reinterpret_cast<PyObject*>(&PyDict_Type);
    const auto bytes =
        py::reinterpret_steal<py::object>(PyObject_CallMethod(type, "__sizeof__", "O", dict));
    if (!bytes) throw py::error_already_set();
    const Py_ssize_t of_keys = PyLong_AsSsize_t(bytes.ptr()) - Py_TYPE(dict)->tp_basicsize;
    const auto length = static_cast<Py_ssize_t>(items.size() * sizeof(Item));
    for (Py_ssize_t at = 0; length > 0 && at + length <= of_keys; at += sizeof(void*)) {
      if (std::memcmp(keys_ + at, items.data(), length) == 0) {
        offset_ = at;
        return;
      }
    }
  }

  // Whether a dict has as many items as then, in memory that is the same and is divided alike: it
  // may have been freed meanwhile, and given to keys with a smaller table.
  bool knows(PyObject* dict) const {
    return memory(dict) == keys_ && PyDict_GET_SIZE(dict) == count_ && shape(keys_) == shape_;
  }
#else
  explicit DictItems(PyObject*) {}

  bool knows(PyObject*) const { return true; }
#endif

  // The items of such a dict, if they were found; else null: ask Python.
  const Item* of(PyObject* dict) const {
    return knows(dict) && offset_ > 0 ? reinterpret_cast<const Item*>(keys_ + offset_) : nullptr;
  }

 private:
  static const char* memory(PyObject* dict) {
    return reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  }

  // Of keys: the size of the table, and whether they are strings; behind a count of references.
  static uint32_t shape(const char* keys) {
    uint8_t bytes[3];
    std::memcpy(bytes, keys + sizeof(Py_ssize_t), sizeof bytes);
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16;
  }

  const char* keys_ = nullptr;  // of no dict
  Py_ssize_t count_ = 0, offset_ = 0;
  uint32_t shape_ = 0;
};

// What a weak reference refers to; None if that is gone. To call it takes longer.
inline py::object referent(const py::weakref& reference) {
#if PY_VERSION_HEX < 0x030D0000
  return py::reinterpret_borrow<py::object>(PyWeakref_GET_OBJECT(reference.ptr()));
#else
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &object) < 0) throw py::error_already_set();
  return object ? py::reinterpret_steal<py::object>(object) : py::none();
#endif
}

// Behind the head of a Python object is a tensor's pointer, a list's items, or a dict's size and
// version: in one cache line, in which the head need not be.
inline void prefetch_object(const PyObject* object) { __builtin_prefetch(object + 1); }

// Where a dict keeps its items, of which it is to have been asked for itself.
inline void prefetch_items(PyObject* dict) {
  const char* const items =
      reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  const Py_ssize_t bytes = 64 + 16 * PyDict_GET_SIZE(dict);
  for (Py_ssize_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(items + offset);
}

class DictSnapshot {
 public:
  // `counts` tells of a key whether its value must stay, or may be replaced by another.
  template <typename Counts>
  DictSnapshot(py::dict dict, Counts&& counts) : dict_(std::move(dict)) {
    for (auto item : dict_) {
      PyObject* const value = counts(item.first) ? item.second.ptr() : nullptr;
      items_.emplace_back(py::reinterpret_borrow<py::object>(item.first),
                          py::reinterpret_borrow<py::object>(value));
    }
    version_ = DictVersion(dict_.ptr());
  }

  bool unchanged() {
    if (version_.is_of(dict_.ptr())) return true;
    const DictVersion version(dict_.ptr());
    if (static_cast<size_t>(PyDict_GET_SIZE(dict_.ptr())) != items_.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& item : items_) {
      if (!PyDict_Next(dict_.ptr(), &position, &key, &value)) return false;
      if (key != item.first.ptr()) return false;
      if (item.second && value != item.second.ptr()) return false;
    }
    version_ = version;
    return true;
  }

  const py::dict& dict() const { return dict_; }

  template <typename Visit>
  void each_reference(Visit&& visit) const {
    visit(dict_);
    for (const auto& [key, value] : items_) {
      visit(key);
      visit(value);
    }
  }

 private:
  py::dict dict_;
  // Owned, so that the address of a dropped item cannot come back as another object.
  std::vector<std::pair<py::object, py::object>> items_;
  DictVersion version_;
};

class ListSnapshot {
 public:
  explicit ListSnapshot(py::list list) : list_(std::move(list)) {
    for (auto item : list_) items_.push_back(py::reinterpret_borrow<py::object>(item));
  }

  // Asks for the memory that `unchanged` reads first.
  void prefetch() const {
    prefetch_object(list_.ptr());
    __builtin_prefetch(items_.data());
  }

  size_t size() const { return items_.size(); }
  py::handle operator[](size_t i) const { return items_[i]; }

  bool unchanged() const {
    if (static_cast<size_t>(PyList_GET_SIZE(list_.ptr())) != items_.size()) return false;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (PyList_GET_ITEM(list_.ptr(), i) != items_[i].ptr()) return false;
    }
    return true;
  }

  template <typename Visit>
  void each_reference(Visit&& visit) const {
    visit(list_);
    for (const py::object& item : items_) visit(item);
  }

 private:
  py::list list_;
  std::vector<py::object> items_;  // owned, for the same reason
};

}  // namespace recap
