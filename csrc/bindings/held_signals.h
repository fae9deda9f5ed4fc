// Signals that wait until a step has been taken whole.
#pragma once

#include <utility>
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

  std::vector<std::pair<int, py::object>> handlers_;
};

}  // namespace recap
