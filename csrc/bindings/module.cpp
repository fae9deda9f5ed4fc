// The extension module: plans for Python, and what this build contains.
#include <torch/version.h>

#include "../cpu/engine.h"
#include "bound_plan.h"
#include "python.h"

namespace recap {

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native side of recap_fast: bound plans and the engines that run them.";

  py::enum_<Outcome>(m, "Outcome")
      .value("stepped", Outcome::stepped)
      .value("skipped", Outcome::skipped)
      .value("stale", Outcome::stale)
      .value("needs_state", Outcome::needs_state);

  py::class_<GroupSource>(m, "GroupSource")
      .def(py::init<std::string, std::string, py::dict, py::dict, std::vector<std::string>>(),
           py::arg("algorithm"), py::arg("name"), py::arg("group"), py::arg("state"),
           py::arg("names"));

  py::class_<BoundPlan>(m, "BoundPlan")
      .def(py::init<const std::vector<GroupSource>&, const std::vector<py::list>&,
                    const std::vector<size_t>&>(),
           py::arg("groups"), py::arg("lists"), py::arg("first"))
      .def("step", &BoundPlan::step, py::arg("grad_scale"), py::arg("found_inf"))
      .def_property_readonly("slots_without_state", &BoundPlan::slots_without_state);

  m.def("instruction_sets", &cpu::instruction_sets);
  m.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
  m.def("instruction_set_in_use", &cpu::instruction_set_in_use);
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("has_cuda_engine") = false;
}

}  // namespace recap
