// Starts the kernel; the only function that kernel.cu offers.
#pragma once

#include <cuda_runtime.h>

namespace recap::cuda {

// `arguments` holds `bytes` bytes in room for kLargeArguments; a copy is taken.
cudaError_t launch_kernel(size_t bytes, unsigned blocks, void* arguments, cudaStream_t stream);

}  // namespace recap::cuda
