// Starts the kernels.
#pragma once

#include <cuda_runtime.h>

namespace recap::cuda {

// `arguments` holds `bytes` bytes in room for kLargeArguments; a copy is taken. The first takes
// values from the host, the second computes them on the device.
cudaError_t launch_host_values_kernel(size_t bytes, unsigned blocks, void* arguments,
                                      cudaStream_t stream);
cudaError_t launch_device_values_kernel(size_t bytes, unsigned blocks, void* arguments,
                                        cudaStream_t stream);

}  // namespace recap::cuda
