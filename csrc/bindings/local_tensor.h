// What this process holds of a tensor: the local shard of a DTensor (torch.distributed.tensor), and
// any other tensor itself.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include "python.h"

namespace recap {

// A tensor with one of these is not what its memory says: a subclass without memory of its own, or
// a lazily negated or zeroed view.
constexpr c10::DispatchKeySet kWrapperKeys{c10::DispatchKey::Python,
                                           c10::DispatchKey::PythonTLSSnapshot};
constexpr c10::DispatchKeySet kLazyKeys{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};

inline bool is_wrapper_subclass(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has_any(kWrapperKeys);
}

inline bool is_lazy(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has_any(kLazyKeys);
}

// Without the dimensions along which an expanded tensor repeats its elements.
inline at::Tensor distinct_elements(at::Tensor tensor) {
  if (tensor.layout() != at::kStrided) return tensor;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.stride(dim) == 0 && tensor.size(dim) > 1) tensor = tensor.narrow(dim, 0, 1);
  }
  return tensor;
}

// An attribute that the object goes on holding, and so a borrowed reference; null if it has none.
inline PyObject* held_attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value) {
    Py_DECREF(value);
  } else {
    PyErr_Clear();
  }
  return value;
}

// The class DTensor; null if nobody has imported it, and so nobody has one.
inline PyTypeObject* dtensor_type() {
  static PyObject* type = nullptr;
  if (!type) {
    PyObject* const module =
        PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
    if (module) type = PyObject_GetAttrString(module, "DTensor");
    PyErr_Clear();
  }
  return reinterpret_cast<PyTypeObject*>(type);
}

// The local shard of a DTensor; null for any other object, whatever its attributes.
inline PyObject* local_shard(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  if (!THPVariable_Check(tensor) || !is_wrapper_subclass(THPVariable_Unpack(tensor))) {
    return nullptr;
  }
  PyTypeObject* const dtensor = dtensor_type();
  if (!dtensor || !PyObject_TypeCheck(tensor, dtensor)) return nullptr;
  PyObject* const local = held_attribute(tensor, name);
  return local && THPVariable_Check(local) ? local : nullptr;
}

// The mesh and the placements of a DTensor.
inline PyObject* spec_of(PyObject* dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return held_attribute(dtensor, name);
}

}  // namespace recap
