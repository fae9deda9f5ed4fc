#include "engine.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernel.h"
#include "launches.h"

namespace recap::cuda {
namespace {

void check(cudaError_t error, int device, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and must not surface in somebody else's next check
  throw std::runtime_error("CUDA device " + std::to_string(device) + ": cannot " + what + ": " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device current, and the former one again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&former_), device, "find the current device");
    changed_ = former_ != device;
    if (changed_) check(cudaSetDevice(device), device, "make the device current");
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(former_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

}  // namespace

class Engine::Implementation {
 public:
  Implementation(int device, const Plan& plan, cudaStream_t stream)
      : device_(device), launches_(plan), last_stream_(stream) {
    auto tiles = std::make_unique<std::vector<TileEntry>>(make_tile_table(plan));
    if (tiles->empty()) return;
    CurrentDevice current(device_);
    check(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming), device_, "create an event");
    try {
      upload(std::move(tiles));
    } catch (...) {
      release();
      throw;
    }
  }

  ~Implementation() {
    try {
      CurrentDevice current(device_);
      release();
    } catch (const std::runtime_error&) {
      // The driver has shut down, and the memory with it.
    }
  }

  void run(const Step& step, cudaStream_t stream) {
    CurrentDevice current(device_);
    for (bool more = launches_.first(step); more; more = launches_.next(step)) {
      follow(stream);
      launches_.write(step, tiles_, arguments_);
      check(launch_kernel(launches_.argument_bytes(), launches_.tiles(), arguments_, stream),
            device_, "launch the optimizer step");
    }
  }

  int count(const Step& step) {
    int launches = 0;
    for (bool more = launches_.first(step); more; more = launches_.next(step)) ++launches;
    return launches;
  }

 private:
  void upload(std::unique_ptr<std::vector<TileEntry>> tiles) {
    const size_t bytes = tiles->size() * sizeof(TileEntry);
    void* table = nullptr;
    check(cudaMallocAsync(&table, bytes, last_stream_), device_, "allocate the table of tiles");
    tiles_ = static_cast<TileEntry*>(table);
    check(cudaMemcpyAsync(tiles_, tiles->data(), bytes, cudaMemcpyHostToDevice, last_stream_),
          device_, "copy the table of tiles");
    // The copy may read the host's memory after this returns.
    const auto destroy = [](void* table) { delete static_cast<std::vector<TileEntry>*>(table); };
    const cudaError_t error = cudaLaunchHostFunc(last_stream_, destroy, tiles.get());
    if (error == cudaSuccess) {
      tiles.release();
    } else {
      cudaStreamSynchronize(last_stream_);
    }
    check(error, device_, "release the host's table of tiles");
  }

  void release() {
    if (tiles_) cudaFreeAsync(tiles_, last_stream_);
    if (moved_) cudaEventDestroy(moved_);
  }

  // Makes `stream` wait for what this engine did on the stream before. So the table is there before
  // any step, and all steps are over when it is freed.
  void follow(cudaStream_t stream) {
    if (stream == last_stream_) return;
    check(cudaEventRecord(moved_, last_stream_), device_, "record an event");
    check(cudaStreamWaitEvent(stream, moved_, 0), device_, "wait for an event");
    last_stream_ = stream;
  }

  const int device_;
  Launches launches_;
  TileEntry* tiles_ = nullptr;  // on the device
  cudaEvent_t moved_ = nullptr;
  cudaStream_t last_stream_;
  alignas(8) unsigned char arguments_[kLargeArguments];
};

Engine::Engine(int device, const Plan& plan, void* stream)
    : implementation_(
          std::make_unique<Implementation>(device, plan, static_cast<cudaStream_t>(stream))) {}

Engine::~Engine() = default;

void Engine::run(const Step& step, void* stream) {
  implementation_->run(step, static_cast<cudaStream_t>(stream));
}

int Engine::launches(const Step& step) { return implementation_->count(step); }

}  // namespace recap::cuda
