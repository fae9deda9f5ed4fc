#include "devices.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>

#include "../cuda/engine.h"

namespace recap {

EngineKind engine_for(at::Device device) {
  if (device.is_cpu()) return EngineKind::cpu;
  if (device.is_cuda() && cuda::has_engine()) return EngineKind::cuda;
  return EngineKind::none;
}

int device_number(at::Device device) { return device.index(); }

// Through Python, where torch offers it in CUDA builds; in C++ it would take torch's CUDA
// libraries, and with them a build of torch for CUDA, to link this extension.
void* current_stream(at::Device device) {
  namespace py = pybind11;
  static const py::handle get =
      py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream")).release();
  return reinterpret_cast<void*>(get(device_number(device)).cast<uintptr_t>());
}

void keep_for_current_stream(const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  tensor.record_stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

bool is_capturing(at::Device device) {
  const c10::DeviceGuard guard(device);
  return cuda::is_capturing(device_number(device), current_stream(device));
}

}  // namespace recap
