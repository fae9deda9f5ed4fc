#include "plan_group.h"

#include "devices.h"

namespace recap {

CudaDevices cuda_devices_of(const std::vector<GroupSource>& groups) {
  CudaDevices devices;
  for (const GroupSource& source : groups) {
    for (const py::handle param : source.group["params"]) {
      if (!THPVariable_Check(param.ptr())) continue;
      const at::Device device = THPVariable_Unpack(param.ptr()).device();
      if (engine_for(device) == EngineKind::cuda) devices.insert(device);
    }
  }
  return devices;
}

}  // namespace recap
