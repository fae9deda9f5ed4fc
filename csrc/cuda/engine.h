// The CUDA engine: runs a plan on one device, one kernel launch and no copy per step. Includes no
// CUDA header, so that a caller needs no toolkit.
#pragma once

#include <memory>

#include "../plan/plan.h"
#include "../plan/step.h"

namespace recap::cuda {

// Elements of a tile, which one thread block updates. Small, because in a small model it is the
// number of blocks that keeps the device busy; not smaller, because each block first waits for its
// table entry.
constexpr int64_t kTileSize = 4096;

class Engine {
 public:
  // `plan` has the slots of `device` only, in tiles of at most kTileSize elements, in slot order.
  // What is stable of it is copied to the device in the order of `stream`, a cudaStream_t of that
  // device.
  //
  // Every stream given to an engine must exist until another one is given, or the engine is gone.
  // All functions that can fail throw std::runtime_error with CUDA's own message.
  Engine(int device, const Plan& plan, void* stream);

  // Frees in the order of the last stream that ran a step: a step that is still running keeps its
  // table.
  ~Engine();

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Updates every slot that has a gradient in `step`, in the order of `stream` and after everything
  // this engine has started before. `step` is copied: it may change as soon as `run` returns.
  void run(const Step& step, void* stream);

  // How many kernel launches that takes: none without gradients, one for up to some 3,300 slots in
  // 64 groups, more beyond.
  int launches(const Step& step);

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace recap::cuda
