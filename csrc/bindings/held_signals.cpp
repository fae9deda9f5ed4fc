#include "held_signals.h"

namespace recap {
namespace {

std::vector<int>& arrived() {  // of the main thread alone
  static std::vector<int> signals;
  return signals;
}

// Functions of the module `signal` that are written in C: to call them runs no Python.
struct SignalModule {
  py::object get, set, set_wakeup, note;
  std::vector<int> numbers;

  SignalModule() {
    const auto functions = py::module_::import("_signal");
    get = functions.attr("getsignal");
    set = functions.attr("signal");
    set_wakeup = functions.attr("set_wakeup_fd");
    note = py::cpp_function([](int number, const py::object&) { arrived().push_back(number); });
    for (const py::handle number : functions.attr("valid_signals")()) {
      numbers.push_back(number.cast<int>());
    }
  }
};

const SignalModule& module() {
  static const auto* const module = new SignalModule;  // outlives the interpreter
  return *module;
}

bool is_main_thread() {
  static const py::handle get_ident =
      py::object(py::module_::import("_thread").attr("get_ident")).release();
  static const auto main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  return get_ident().cast<unsigned long>() == main_thread;
}

}  // namespace

HeldSignals::HeldSignals() {
  if (!is_main_thread()) return;
  try {
    for (const int number : module().numbers) {
      py::object handler = module().get(number);
      if (!PyCallable_Check(handler.ptr()) || PyLong_Check(handler.ptr())) continue;
      struct sigaction action;
      sigaction(number, nullptr, &action);
      module().set(number, module().note);  // raises for a signal that has arrived before
      handlers_.push_back({number, std::move(handler), action});
    }
  } catch (...) {
    put_back();
    throw;
  }
}

HeldSignals::~HeldSignals() { put_back(); }

void HeldSignals::put_back() {
  const py::error_scope error;  // one that is on its way stays so
  for (const auto& [number, handler, action] : handlers_) {
    // Other handlers may run in it and raise: then once more.
    for (int attempt = 0; attempt < 3; ++attempt) {
      PyObject* const result =
          PyObject_CallFunction(module().set.ptr(), "iO", number, handler.ptr());
      if (result) {
        Py_DECREF(result);
        break;
      }
      PyErr_Clear();
    }
    sigaction(number, &action, nullptr);  // Python has set its flags anew: siginterrupt is one
  }
  handlers_.clear();
  if (arrived().empty()) return;
  // Whoever waits at the other end of it has been told of them when they arrived.
  PyObject* const set_wakeup = module().set_wakeup.ptr();
  PyObject* const wakeup = PyObject_CallFunction(set_wakeup, "i", -1);
  for (const int number : arrived()) PyErr_SetInterruptEx(number);
  arrived().clear();
  if (wakeup) {
    // Restores it without calling the handlers, whose turn is once the step has returned.
    PyObject* const none = PyObject_CallFunctionObjArgs(set_wakeup, wakeup, nullptr);
    Py_XDECREF(none);
    Py_DECREF(wakeup);
  }
  PyErr_Clear();
}

}  // namespace recap
