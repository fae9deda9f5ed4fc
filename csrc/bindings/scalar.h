// Numbers that Python hands over as such or in a tensor.
#pragma once

#include <ATen/ops/full.h>

#include <string>

#include "python.h"

namespace recap {

// The value of a one-element tensor or a number; `none` for None.
inline double scalar(const py::object& value, const char* name, double none) {
  if (value.is_none()) return none;
  if (THPVariable_Check(value.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.numel() == 1) return tensor.item().toDouble();
  } else if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
    return value.cast<double>();
  }
  throw py::type_error(std::string(name) + " must be None, a number or a one-element tensor");
}

// The same, not None, as a float32 tensor on `device`; if it is one, that itself.
inline at::Tensor scalar_on(const py::object& value, const char* name, at::Device device) {
  if (THPVariable_Check(value.ptr()) && THPVariable_Unpack(value.ptr()).numel() == 1) {
    return THPVariable_Unpack(value.ptr()).detach().to(device, at::kFloat);
  }
  return at::full({}, scalar(value, name, 0.0), at::TensorOptions(device).dtype(at::kFloat));
}

}  // namespace recap
