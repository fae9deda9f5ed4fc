// What this process holds of a tensor: the local shard of a DTensor (torch.distributed.tensor), and
// any other tensor itself.
#pragma once

#include "python.h"
// After Python's own header, without which it does not compile before 3.11.
#include <structmember.h>

#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/variable.h>

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

// Whether memory is shared until somebody writes to it, who takes a copy first: by
// torch._lazy_clone.
inline bool is_copied_on_write(const c10::DataPtr& memory) {
  return memory.get_deleter() == &c10::impl::cow::cow_deleter;
}

// For who has written to a gradient: `whole`, as the parameter has it, and its local shard, if it
// is a DTensor, else the same.
inline void bump_versions(const at::Tensor& whole, const at::Tensor& local) {
  for (const at::Tensor& written : {whole, local}) {
    if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
    if (written.is_same(local)) break;
  }
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

// One of the `__slots__` of a class, read where it is in an object.
class SlotOfClass {
 public:
  SlotOfClass(PyTypeObject* type, const char* name) : name_(PyUnicode_InternFromString(name)) {
    const auto member = py::reinterpret_steal<py::object>(
        PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
    if (!member) PyErr_Clear();
    if (!member || !Py_IS_TYPE(member.ptr(), &PyMemberDescr_Type)) return;
    const PyMemberDef& found = *reinterpret_cast<PyMemberDescrObject*>(member.ptr())->d_member;
    if (found.type == T_OBJECT_EX) offset_ = found.offset;
  }

  // Of an object of the class, a borrowed reference; null if it has none.
  PyObject* in(PyObject* object) const {
    if (offset_ == 0) return held_attribute(object, name_);  // another release of torch
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

 private:
  PyObject* name_;
  Py_ssize_t offset_ = 0;
};

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

// What an object, which is a DTensor, holds as its local shard.
inline PyObject* held_shard(PyObject* dtensor) {
  static const SlotOfClass slot(dtensor_type(), "_local_tensor");
  return slot.in(dtensor);
}

// The local shard of a DTensor; null for any other object, whatever its attributes.
inline PyObject* local_shard(PyObject* tensor) {
  PyTypeObject* const dtensor = dtensor_type();
  if (!dtensor || !PyObject_TypeCheck(tensor, dtensor)) return nullptr;
  PyObject* const local = held_shard(tensor);
  return local && THPVariable_Check(local) ? local : nullptr;
}

// The mesh and the placements of a DTensor.
inline PyObject* spec_of(PyObject* dtensor) {
  static const SlotOfClass slot(dtensor_type(), "_spec");
  return slot.in(dtensor);
}

}  // namespace recap
