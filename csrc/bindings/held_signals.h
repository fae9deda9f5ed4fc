// Signals that wait until a step has been taken whole.
#pragma once

#include <signal.h>

#include <vector>

#include "python.h"

namespace recap {

// While it lives, handlers of signals that are written in Python, such as the one that raises
// KeyboardInterrupt, do not run: they have their turn right afterwards. For a step that is partly
// torch's own, which is Python and would stop between two tensors. Only the main thread handles
// signals; elsewhere this does nothing.
class HeldSignals {
 public:
  HeldSignals();
  ~HeldSignals();
  HeldSignals(const HeldSignals&) = delete;

 private:
  void put_back();

  struct Handler {
    int number;
    py::object handler;
    struct sigaction action;
  };
  std::vector<Handler> handlers_;
};

}  // namespace recap
