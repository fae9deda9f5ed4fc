// The Python and torch headers that every binding needs, in the one order that works: pybind11 as
// it was found by the build, before the copy that torch carries.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

namespace recap {
namespace py = pybind11;
}  // namespace recap
