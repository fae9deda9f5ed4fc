// csrc/bindings/devices.cpp for a machine without a GPU: the CPU is the only CUDA device, and work
// given to its stream is done at once.
#include "bindings/devices.h"

#include <cuda_runtime.h>

#include <cstdlib>

namespace recap {

bool has_cuda_engine() { return true; }

namespace {

// Variables of the environment that tests set to 1.
bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && *value == '1';
}

}  // namespace

// With RECAP_EMULATED_HOST, meta tensors, which must be empty, are those of the host.
EngineKind engine_for(at::Device device) {
  if (device.is_meta() && is_set("RECAP_EMULATED_HOST")) return EngineKind::cpu;
  return device.is_cpu() ? EngineKind::cuda : EngineKind::none;
}

int device_number(at::Device) { return 0; }

// With RECAP_EMULATED_FAILURE, the next call of the runtime fails that can.
void* current_stream(at::Device) {
  emulation::machine().immediate = true;
  if (is_set("RECAP_EMULATED_FAILURE")) emulation::machine().calls_until_failure = 0;
  return nullptr;
}

void keep_for_current_stream(const at::Tensor&) {}

bool is_capturing(at::Device) { return is_set("RECAP_EMULATED_CAPTURE"); }

}  // namespace recap
