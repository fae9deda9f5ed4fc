// One optimizer step with values from the device: what host_values_kernel.cu does, after the
// block's first thread has computed the values of its tile from numbers in device memory.
//
//  * Every block computes its own, rather than one block for all: nothing waits for another block,
//    and there is one launch. It is some hundred dependent operations in double, next to a tile's
//    thousands of elements.
//  * The step changes what it starts from: counts, step and rates. So each block takes a ticket
//    when it has read them, and the block that takes the last one changes them.
#include "../numerics/power.h"
#include "../plan/schedules.h"
#include "any_tile.cuh"
#include "kernel.h"

namespace recap::cuda {
namespace {

// What the first thread of a block finds out for all of them.
struct Found {
  Values values;
  int64_t step;
  bool skips;    // found_inf
  bool is_last;  // of the launch's blocks to read what the step changes
};

RECAP_DEVICE double learning_rate(const DeviceGroup& group) {
  if (!group.lr) return group.hyper.lr;
  return group.lr_is_double ? load_from<double>(group.lr) : load_from<float>(group.lr);
}

RECAP_DEVICE bool take_last_ticket(const DeviceArgumentsHeader& header) {
  if (header.block_count == 1) return true;
  __threadfence();  // what was read before stays before
  return atomicAdd(header.ticket, 1u) == header.block_count - 1;
}

// `grad` is that of `slot`, if the block updates a tile of it.
RECAP_DEVICE void find(const DeviceArgumentsHeader& header, SlotGrad grad, uint32_t slot,
                       Found& found) {
  found.skips = header.found_inf && load_from<float>(header.found_inf) != 0.0f;
  found.step = header.rates.step ? load_from<int64_t>(header.rates.step) : 0;
  if (!grad.bits) {
    found.is_last = take_last_ticket(header);
    return;
  }
  const DeviceGroup& group = table<DeviceGroup>(header, header.groups)[grad.entry()];
  const double count = load_from<float>(header.counts + slot);
  const double lr = learning_rate(group);
  const double grad_scale = header.grad_scale ? load_from<float>(header.grad_scale) : 1.0;
  found.is_last = take_last_ticket(header);
  const StepInputs inputs = {lr, count + 1.0, count == 0.0, gradient_factor(grad_scale, 1.0)};
  const auto correction = [](double beta, double step) { return bias_correction(beta, step); };
  compute_values(group.hyper, inputs, correction, found.values);
}

// All threads of the last block.
RECAP_DEVICE void move_on(const DeviceArgumentsHeader& header, const Found& found) {
  __threadfence();
  if (!found.skips) {
    const auto* const grads = table<SlotGrad>(header, header.grads);
    for (uint32_t slot = threadIdx.x; slot < header.slots; slot += kThreads) {
      float* const count = header.counts + slot;
      if (grads[slot].bits) store_to(count, load_from<float>(count) + 1.0f);
    }
  }
  const RateTable& rates = header.rates;
  for (uint32_t i = threadIdx.x; i < rates.count; i += kThreads) {
    store_to(rates.rates + i, rate_at(rates.schedules, i, found.step + 1));
  }
  if (threadIdx.x == 0) {
    if (rates.step) store_to(rates.step, found.step + 1);
    if (header.block_count > 1) store_to(header.ticket, 0u);
  }
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) update_tiles_by_device_values(
    const Arguments<DeviceArgumentsHeader, kBytes> __grid_constant__ arguments) {
  const DeviceArgumentsHeader& header = arguments.header;
  __shared__ Found found;
  const TileEntry* const tile = header.tiles + blockIdx.x;
  SlotGrad grad;
  uint32_t slot = 0;
  if (blockIdx.x < header.tile_count) {
    slot = tile->slot - header.first_slot;
    grad = table<SlotGrad>(header, header.grads)[slot];
  }
  if (threadIdx.x == 0) find(header, grad, slot, found);
  __syncthreads();
  if (grad.bits && !found.skips) {
    update_any_tile(*tile, header.formats, found.values.update, found.values.float32,
                    found.values.float64, &found.values.step, grad.address());
  }
  // In a step that is skipped too: what is not finite would stay so whatever is added to it.
  if (header.clears_grads) {
    // All is read anew: kept until here, it would take registers from the update.
    const uint32_t block = block_number();
    if (block < header.tile_count) {
      const TileEntry& again = header.tiles[block];
      const SlotGrad of_slot =
          table<SlotGrad>(header, header.grads)[again.slot - header.first_slot];
      if (of_slot.bits && found.values.clears_grads)
        clear_grad_of_any_tile(again, header.formats, of_slot.address());
    }
  }
  // Not before the update, whose registers it would need.
  if (found.is_last) move_on(header, found);
}

template <int kBytes>
cudaError_t launch_with_device_values(unsigned blocks, void* arguments, cudaStream_t stream) {
  return cudaLaunchKernel(update_tiles_by_device_values<kBytes>, dim3(blocks), dim3(kThreads),
                          &arguments, 0, stream);
}

}  // namespace

cudaError_t launch_device_values_kernel(size_t bytes, unsigned blocks, void* arguments,
                                        cudaStream_t stream) {
  return bytes <= kSmallArguments
             ? launch_with_device_values<kSmallArguments>(blocks, arguments, stream)
             : launch_with_device_values<kLargeArguments>(blocks, arguments, stream);
}

}  // namespace recap::cuda
