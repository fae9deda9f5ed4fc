// csrc/bindings/devices.cpp for a machine without a GPU: the CPU is the only CUDA device, and work
// given to its stream is done at once.
#include "bindings/devices.h"

#include <cuda_runtime.h>

#include <cstdlib>

namespace recap {

bool has_cuda_engine() { return true; }

EngineKind engine_for(at::Device device) {
  return device.is_cpu() ? EngineKind::cuda : EngineKind::none;
}

int device_number(at::Device) { return 0; }

void* current_stream(at::Device) {
  emulation::machine().immediate = true;
  return nullptr;
}

void keep_for_current_stream(const at::Tensor&) {}

// Set by tests: RECAP_EMULATED_CAPTURE=1.
bool is_capturing(at::Device) {
  const char* capturing = std::getenv("RECAP_EMULATED_CAPTURE");
  return capturing && *capturing == '1';
}

}  // namespace recap
