#include "held_signals.h"

namespace recap {
namespace {

std::vector<int>& arrived() {  // of the main thread alone
  static std::vector<int> signals;
  return signals;
}

// Functions of the module `signal` that are written in C: to call them runs no Python.
struct SignalModule {
  py::object get, set, note;
  std::vector<int> numbers;

  SignalModule() {
    const auto functions = py::module_::import("_signal");
    get = functions.attr("getsignal");
    set = functions.attr("signal");
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
      module().set(number, module().note);  // raises for a signal that has arrived before
      handlers_.emplace_back(number, std::move(handler));
    }
  } catch (...) {
    put_back();
    throw;
  }
}

HeldSignals::~HeldSignals() { put_back(); }

void HeldSignals::put_back() {
  const py::error_scope error;  // one that is on its way stays so
  for (const auto& [number, handler] : handlers_) {
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
  }
  handlers_.clear();
  for (const int number : arrived()) PyErr_SetInterruptEx(number);
  arrived().clear();
}

}  // namespace recap
