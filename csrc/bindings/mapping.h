// Entries of Python mappings: of dicts as quickly as they can be had, of others all the same.
#pragma once

#include "python.h"

namespace recap {

inline bool is_mapping(const py::object& object) {
  if (PyDict_Check(object.ptr())) return true;
  static const py::handle mapping =
      py::object(py::module_::import("collections.abc").attr("Mapping")).release();
  return py::isinstance(object, mapping);
}

// What a mapping has under a key; null: nothing.
inline py::object item_of(const py::object& mapping, const py::object& key) {
  if (PyDict_Check(mapping.ptr())) {
    PyObject* const value = PyDict_GetItemWithError(mapping.ptr(), key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(value);
  }
  PyObject* const value = PyObject_GetItem(mapping.ptr(), key.ptr());
  if (value) return py::reinterpret_steal<py::object>(value);
  if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
  PyErr_Clear();
  return {};
}

inline py::object item_of(const py::object& mapping, const char* key) {
  return item_of(mapping, py::str(key));
}

inline void set_item(const py::object& mapping, const py::object& key, const py::object& value) {
  const int result = PyDict_Check(mapping.ptr())
                         ? PyDict_SetItem(mapping.ptr(), key.ptr(), value.ptr())
                         : PyObject_SetItem(mapping.ptr(), key.ptr(), value.ptr());
  if (result < 0) throw py::error_already_set();
}

inline void set_item(const py::object& mapping, const char* key, const py::object& value) {
  set_item(mapping, py::str(key), value);
}

}  // namespace recap
