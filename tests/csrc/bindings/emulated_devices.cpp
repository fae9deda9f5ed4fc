// csrc/bindings/devices.cpp for a machine without a GPU: the CPU is a CUDA device, and work given
// to its stream is done at once. So are cuda:0 and cuda:1, whose tensors are in memory of the CPU.
#include "bindings/devices.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cuda_runtime.h>

#include <cstdlib>

namespace recap {

namespace {

// Variables of the environment that tests set to 1.
bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && *value == '1';
}

// torch's own guard of the current device, where its build has none.
const bool registered = [] {
  constexpr auto kind = at::DeviceType::CUDA;
  if (c10::impl::hasDeviceGuardImpl(kind)) return false;
  c10::impl::DeviceGuardImplRegistrar(kind, new c10::impl::NoOpDeviceGuardImpl<kind>());
  return true;
}();

}  // namespace

// With RECAP_EMULATED_HOST, meta tensors, which must be empty, are those of the host.
EngineKind engine_for(at::Device device) {
  if (device.is_meta() && is_set("RECAP_EMULATED_HOST")) return EngineKind::cpu;
  return device.is_cpu() || device.is_cuda() ? EngineKind::cuda : EngineKind::none;
}

int device_number(at::Device device) { return device.is_cuda() ? device.index() : 0; }

// With RECAP_EMULATED_FAILURE, the next call of the runtime fails that can.
void* current_stream(at::Device) {
  emulation::machine().immediate = true;
  if (is_set("RECAP_EMULATED_FAILURE")) emulation::machine().calls_until_failure = 0;
  return nullptr;
}

void keep_for_current_stream(const at::Tensor&) {}

bool is_capturing(at::Device) { return is_set("RECAP_EMULATED_CAPTURE"); }

}  // namespace recap
