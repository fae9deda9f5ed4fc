#include "engine.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
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

// Makes a device current, and the former one again at the end. That makes a context there, if there
// is none: a caller that may be on such a device makes ours current by other means.
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

bool captures(int device, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), device, "ask whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

bool has_engine() { return true; }

class Engine::Implementation {
 public:
  Implementation(int device, const Plan& plan, cudaStream_t stream)
      : device_(device), launches_(plan), last_stream_(stream) {
    const DeviceTable table = make_device_table(plan);
    CurrentDevice current(device_);
    check(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming), device_, "create an event");
    try {
      if (!table.tiles.empty()) upload(table);
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
    run(step, stream, [&] {
      launches_.write(step, tiles_, arguments_);
      return launch_host_values_kernel(launches_.argument_bytes(), launches_.blocks(), arguments_,
                                       stream);
    });
  }

  void run(const DeviceStep& step, cudaStream_t stream) {
    const auto has_grad = [](const void* grad) { return grad != nullptr; };
    if (!step.counts && std::any_of(step.grads.begin(), step.grads.end(), has_grad)) {
      throw std::invalid_argument("a step with device values needs step counts in device memory");
    }
    run(step, stream, [&] {
      launches_.write(step, tiles_, ticket_, arguments_);
      return launch_device_values_kernel(launches_.argument_bytes(), launches_.blocks(), arguments_,
                                         stream);
    });
  }

  template <typename AnyStep>
  int count(const AnyStep& step) {
    int launches = 0;
    for (bool more = launches_.first(step); more; more = launches_.next(step)) ++launches;
    return launches;
  }

 private:
  template <typename AnyStep, typename Launch>
  void run(const AnyStep& step, cudaStream_t stream, const Launch& launch) {
    CurrentDevice current(device_);
    for (bool more = launches_.first(step); more; more = launches_.next(step)) {
      follow(stream);
      check(launch(), device_, "launch the optimizer step");
    }
  }

  // One allocation and one copy: the ticket, in the place of a first entry, tiles and formats.
  void upload(const DeviceTable& table) {
    const size_t tile_bytes = (1 + table.tiles.size()) * sizeof(TileEntry);
    const size_t bytes = tile_bytes + table.formats.size() * sizeof(FormatEntry);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, bytes, last_stream_), device_, "allocate the table of tiles");
    ticket_ = static_cast<uint32_t*>(memory);
    tiles_ = static_cast<TileEntry*>(memory) + 1;
    auto source = std::make_unique<std::vector<char>>(bytes);
    const auto put = [to = source->data()](const auto& entries, size_t offset) {
      std::memcpy(to + offset, entries.data(), entries.size() * sizeof entries[0]);
    };
    put(table.tiles, sizeof(TileEntry));
    if (!table.formats.empty()) put(table.formats, tile_bytes);
    check(cudaMemcpyAsync(memory, source->data(), bytes, cudaMemcpyHostToDevice, last_stream_),
          device_, "copy the table of tiles");
    // The copy may read the host's memory after this returns.
    const auto destroy = [](void* bytes) { delete static_cast<std::vector<char>*>(bytes); };
    const cudaError_t error = cudaLaunchHostFunc(last_stream_, destroy, source.get());
    if (error == cudaSuccess) {
      source.release();
    } else {
      cudaStreamSynchronize(last_stream_);
    }
    check(error, device_, "release the host's table of tiles");
  }

  void release() {
    if (moved_) cudaEventDestroy(moved_);
    if (!ticket_ || captured_ || captures(device_, last_stream_)) return;
    cudaFreeAsync(ticket_, last_stream_);
  }

  // Makes `stream` wait for what this engine did on the stream before. So the table is there before
  // any step, and all steps are over when it is freed. A stream that is captured cannot wait for
  // one that is not, and what it captures runs later, on any stream.
  void follow(cudaStream_t stream) {
    if (captures(device_, stream)) {
      captured_ = true;
      return;
    }
    if (stream == last_stream_) return;
    check(cudaEventRecord(moved_, last_stream_), device_, "record an event");
    check(cudaStreamWaitEvent(stream, moved_, 0), device_, "wait for an event");
    last_stream_ = stream;
  }

  const int device_;
  Launches launches_;
  uint32_t* ticket_ = nullptr;  // on the device, with the table behind it
  TileEntry* tiles_ = nullptr;
  bool captured_ = false;  // a graph may use them for as long as it likes
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

void Engine::run(const DeviceStep& step, void* stream) {
  implementation_->run(step, static_cast<cudaStream_t>(stream));
}

int Engine::launches(const Step& step) { return implementation_->count(step); }

int Engine::launches(const DeviceStep& step) { return implementation_->count(step); }

bool is_capturing(int device, void* stream) {
  CurrentDevice current(device);
  return captures(device, static_cast<cudaStream_t>(stream));
}

}  // namespace recap::cuda
