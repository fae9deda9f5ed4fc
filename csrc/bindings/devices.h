// Where tensors live in torch's terms, and which engine steps them there.
#pragma once

#include <ATen/core/Tensor.h>

namespace recap {

enum class EngineKind { none, cpu, cuda };

EngineKind engine_for(at::Device device);

// Of a device with the CUDA engine: its number, and torch's current stream there, a cudaStream_t.
int device_number(at::Device device);
void* current_stream(at::Device device);

// Keeps the tensor's memory from being used again before the current stream has done what it has
// been given, although the tensor is freed earlier and belongs to another stream.
void keep_for_current_stream(const at::Tensor& tensor);

// Whether that stream is being captured into a graph.
bool is_capturing(at::Device device);

}  // namespace recap
