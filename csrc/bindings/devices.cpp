#include "devices.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#if defined(RECAP_WITH_CUDA)
#include "../cuda/engine.h"
#endif

namespace recap {

bool has_cuda_engine() {
#if defined(RECAP_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

EngineKind engine_for(at::Device device) {
  if (device.is_cpu()) return EngineKind::cpu;
  if (device.is_cuda() && has_cuda_engine()) return EngineKind::cuda;
  return EngineKind::none;
}

int device_number(at::Device device) { return device.index(); }

// Through Python, where torch offers it in CUDA builds; in C++ it would take torch's CUDA
// libraries, and with them a build of torch for CUDA, to link this extension.
void* current_stream(at::Device device) {
  static const py::handle get =
      py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream")).release();
  return reinterpret_cast<void*>(get(device_number(device)).cast<uintptr_t>());
}

void keep_for_current_stream(const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  tensor.record_stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

bool is_capturing(at::Device device) {
#if defined(RECAP_WITH_CUDA)
  const c10::DeviceGuard guard(device);
  return cuda::is_capturing(device_number(device), current_stream(device));
#else
  (void)device;
  return false;
#endif
}

}  // namespace recap
