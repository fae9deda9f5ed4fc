// The extension module: plans for Python, and what this build contains.
#include <torch/csrc/Dtype.h>
#include <torch/version.h>

#include "../cpu/engine.h"
#include "../cpu/first_touch.h"
#include "../cpu/ways.h"
#include "../cuda/engine.h"
#include "../plan/schedule_table.h"
#include "bound_plan.h"
#include "devices.h"
#include "python.h"
#include "state_block.h"
#include "thread_pool.h"

namespace recap {
namespace {

// The plan of an object of Python; null while it is being made.
BoundPlan* plan_in(PyObject* self) {
  const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? static_cast<BoundPlan*>(holder.value_ptr()) : nullptr;
}

// Called as torch's own methods are: pybind11's dispatch reads much that backward has evicted.
PyObject* step_plainly(PyObject* self, PyObject*) {
  try {
    BoundPlan* const plan = plan_in(self);
    if (!plan) throw std::runtime_error("the plan is not made yet");
    return PyBool_FromLong(plan->step_plainly());
  } catch (...) {
    py::detail::try_translate_exceptions();
    return nullptr;
  }
}

void add_step_plainly(const py::handle& type) {
  static PyMethodDef method = {"step_plainly", step_plainly, METH_NOARGS, nullptr};
  auto* const owner = reinterpret_cast<PyTypeObject*>(type.ptr());
  type.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(owner, &method));
}

// Has the garbage collector see what a plan owns: an optimizer owns its plan, and what the plan
// owns may refer to the optimizer.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* argument) {
    int result = visit(reinterpret_cast<PyObject*>(Py_TYPE(self)), argument);
    if (const BoundPlan* const plan = plan_in(self)) {
      plan->each_reference([&](const py::handle& owned) {
        if (result == 0 && owned) result = visit(owned.ptr(), argument);
      });
    }
    return result;
  };
  type->tp_clear = [](PyObject* self) {
    if (BoundPlan* const plan = plan_in(self)) plan->clear();
    return 0;
  };
}

// On purpose: a step reads dicts, lists and tensors that are the user's, in the order of its
// checks, and what keeps another thread from changing them meanwhile is the GIL. A Python without
// one switches it on when it imports the module, and says so.
py::mod_gil_not_used uses_gil() {
#if PYBIND11_VERSION_HEX >= 0x03010000
  return py::mod_gil_used();
#else
  return py::mod_gil_not_used(false);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m, uses_gil()) {
  m.doc() = "The native side of recap_fast: bound plans and the engines that run them.";

  // Plain numbers: to compare members of an enum takes longer than to step a parameter.
  m.attr("STEPPED") = static_cast<int>(Outcome::stepped);
  m.attr("SKIPPED") = static_cast<int>(Outcome::skipped);
  m.attr("STALE") = static_cast<int>(Outcome::stale);
  m.attr("NEEDS_STATE") = static_cast<int>(Outcome::needs_state);

  py::class_<GroupSource>(m, "GroupSource")
      .def(py::init<std::string, std::string, py::dict, py::dict, std::vector<std::string>, bool>(),
           py::arg("algorithm"), py::arg("name"), py::arg("group"), py::arg("state"),
           py::arg("names"), py::arg("clears_grads"));

  py::class_<StateBlock, std::shared_ptr<StateBlock>>(m, "StateBlock")
      .def(py::init<int64_t>(), py::arg("size"))
      .def_property_readonly("size", &StateBlock::size)
      .def_property_readonly(
          "address",
          [](const StateBlock& block) { return reinterpret_cast<uintptr_t>(block.address()); })
      .def(
          "tensor",
          [](StateBlock& block, int64_t offset, const std::vector<int64_t>& shape,
             const std::vector<int64_t>& strides, const py::handle& dtype) {
            if (!THPDtype_Check(dtype.ptr())) throw py::type_error("dtype must be a torch.dtype");
            const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
            return py::reinterpret_steal<py::object>(
                THPVariable_Wrap(block.tensor(offset, shape, strides, type)));
          },
          py::arg("offset"), py::arg("shape"), py::arg("strides"), py::arg("dtype"));

  py::class_<NewState>(m, "NewState")
      .def(py::init<size_t, py::dict, bool, py::object>(), py::arg("slot"), py::arg("entries"),
           py::arg("is_first"), py::arg("left_behind"));

  py::class_<BoundPlan> bound_plan(m, "BoundPlan", py::custom_type_setup(make_collectable));
  add_step_plainly(bound_plan);
  bound_plan
      .def(py::init<const std::vector<GroupSource>&, const std::vector<py::object>&,
                    const std::vector<NewState>&, bool>(),
           py::arg("groups"), py::arg("optimizers"), py::arg("new_states"),
           py::arg("device_values"))
      .def("adopt", &BoundPlan::adopt)
      .def_property_readonly("is_captured", &BoundPlan::is_captured)
      .def("check_captured_rates", &BoundPlan::check_captured_rates)
      .def(
          "set_schedules",
          [](BoundPlan& plan, const std::vector<size_t>& groups, const py::handle& schedules,
             const py::handle& rates, const py::handle& step) {
            plan.set_schedules(groups, THPVariable_Unpack(schedules.ptr()),
                               THPVariable_Unpack(rates.ptr()), THPVariable_Unpack(step.ptr()));
          },
          py::arg("groups"), py::arg("schedules"), py::arg("rates"), py::arg("step"))
      .def(
          "set_clipping",
          [](BoundPlan& plan, double max_norm, std::vector<uint32_t> part_of_slot, size_t parts,
             py::object total) {
            plan.set_clipping({max_norm, std::move(part_of_slot), parts, std::move(total)});
          },
          py::arg("max_norm"), py::arg("part_of_slot"), py::arg("parts"), py::arg("total"))
      .def_property_readonly("grad_norm", &BoundPlan::grad_norm)
      .def_property_readonly("has_device_plans", &BoundPlan::has_device_plans)
      .def(
          "sums_of_squares",
          [](BoundPlan& plan, const std::vector<uint32_t>& part_of_slot, size_t parts) {
            py::list sums;
            for (const at::Tensor& sum : plan.sums_of_squares(part_of_slot, parts)) {
              sums.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(sum)));
            }
            return sums;
          },
          py::arg("part_of_slot"), py::arg("parts"))
      .def(
          "step",
          [](BoundPlan& plan, const py::object& grad_scale, const py::object& found_inf,
             const py::object& unscale_by, const py::sequence& others) {
            return static_cast<int>(plan.step(grad_scale, found_inf, unscale_by, others));
          },
          py::arg("grad_scale"), py::arg("found_inf"), py::arg("unscale_by") = py::none(),
          py::arg("others") = py::tuple())
      .def_property_readonly("failed_elsewhere", &BoundPlan::failed_elsewhere)
      .def_property_readonly("slots_without_state", &BoundPlan::slots_without_state);

  py::class_<ScheduleTable>(m, "ScheduleTable")
      .def(py::init())
      .def("add_constant", &ScheduleTable::add_constant, py::arg("rate"))
      .def("add_piecewise_constant", &ScheduleTable::add_piecewise_constant, py::arg("boundaries"),
           py::arg("rates"))
      .def("add_linear_ramp_to_constant", &ScheduleTable::add_linear_ramp_to_constant,
           py::arg("rate"), py::arg("ramp"))
      .def("add_linear_ramp_to_cosine", &ScheduleTable::add_linear_ramp_to_cosine, py::arg("rate"),
           py::arg("ramp"), py::arg("final_rate"), py::arg("final_step"))
      .def("numbers", &ScheduleTable::numbers);

  m.def(
      "any_on_cuda",
      [](const std::vector<GroupSource>& groups) { return !cuda_devices_of(groups).empty(); },
      py::arg("groups"));
  m.def(
      "is_on_cuda",
      [](const py::handle& object) {
        return THPVariable_Check(object.ptr()) &&
               engine_for(THPVariable_Unpack(object.ptr()).device()) == EngineKind::cuda;
      },
      py::arg("object"));
  m.def("instruction_sets", &cpu::instruction_sets);
  m.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
  m.def("instruction_set_in_use", &cpu::instruction_set_in_use);
  m.def(
      "touch_pages",
      [](const py::handle& tensor, double begin, double end) {
        const at::Tensor& memory = THPVariable_Unpack(tensor.ptr());
        cpu::touch_pages(memory.mutable_data_ptr(), static_cast<int64_t>(memory.nbytes()),
                         {begin, end}, torch_thread_pool());
      },
      py::arg("tensor"), py::arg("begin"), py::arg("end"));
  m.def("fix_way", &cpu::fix_way, py::arg("streams"), py::arg("ahead"), py::arg("level"));
  m.def("chosen_ways", [] {
    std::vector<std::tuple<std::string, int, bool, std::tuple<int, int, bool>>> all;
    for (const cpu::ChosenWay& each : cpu::chosen_ways()) {
      all.emplace_back(each.kind, each.arrays, each.large,
                       std::tuple(each.way.streams, each.way.ahead, each.way.narrow));
    }
    return all;
  });
  m.def("chosen_level", []() -> std::optional<int> {
    const auto way = cpu::tuner_of_short().found_best();
    return way ? std::optional(way->level) : std::nullopt;
  });
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("has_cuda_engine") = cuda::has_engine();
}

}  // namespace recap
