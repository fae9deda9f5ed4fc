// The CUDA engine: runs a plan on one device, one kernel launch and no copy per step. Values come
// from the host or are computed on the device. Includes no CUDA header, so that a caller needs no
// toolkit.
#pragma once

#include <memory>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "device_step.h"

namespace recap::cuda {

// Elements of a tile, which one thread block updates. Small, because in a small model it is the
// number of blocks that keeps the device busy; not smaller, because each block first waits for its
// table entry.
constexpr int64_t kTileSize = 4096;

// Whether this build has it. Without (no_engine.cpp), none can be made, and nothing is captured.
bool has_engine();

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
  // table. What a graph has captured is not freed: nothing tells when the last graph is gone. Nor
  // is anything while that stream is being captured, since the graph would take the free.
  ~Engine();

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Updates every slot that has a gradient in `step`, in the order of `stream` and after everything
  // this engine has started before. `step` is copied: it may change as soon as `run` returns.
  //
  // If `stream` is being captured into a graph, all that was started before must be over, as it is
  // after a synchronisation of the device, and a replay is ordered only by the stream it is given.
  void run(const Step& step, void* stream);

  // The same with values that are computed on the device. What is copied are the addresses: the
  // memory must hold until the step is over. Throws std::invalid_argument if there is a gradient
  // but nowhere to count.
  void run(const DeviceStep& step, void* stream);

  // How many kernel launches that takes: one for up to some 3,700 slots in 64 groups with values
  // from the host (3,200 if one is float64), or 3,500 with those of the device, more beyond; none
  // without gradients, but one if there are rates.
  int launches(const Step& step);
  int launches(const DeviceStep& step);

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

// Whether `stream` of `device` is being captured into a graph.
bool is_capturing(int device, void* stream);

}  // namespace recap::cuda
