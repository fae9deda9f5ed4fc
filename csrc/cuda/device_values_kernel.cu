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

// Numbers that the step's last block changes. Unlike `load_from`, which the compiler may take for a
// function of the address and move, this stays before the ticket.
RECAP_DEVICE uint32_t load_before_ticket(const uint32_t* address) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
  return word;
#else
  return __ldcg(address);
#endif
}
RECAP_DEVICE unsigned long long load_before_ticket(const unsigned long long* address) {
#if defined(__CUDA_ARCH__)
  unsigned long long word;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
  return word;
#else
  return __ldcg(address);
#endif
}
template <typename Value>
RECAP_DEVICE Value load_before_ticket(const void* address) {
  const auto word =
      load_before_ticket(static_cast<const typename Word<sizeof(Value)>::type*>(address));
  Value value;
  memcpy(&value, &word, sizeof value);
  return value;
}

RECAP_DEVICE double learning_rate(const DeviceGroup& group) {
  if (!group.lr) return group.hyper.lr;
  return group.lr_is_double ? load_before_ticket<double>(group.lr)
                            : load_before_ticket<float>(group.lr);
}

// How many blocks have taken one before. What was read before stays before: the addition releases.
// A fence would do too, but it also throws the block's table entry out of the first-level cache,
// and nothing could be computed until it is over.
RECAP_DEVICE uint32_t take_ticket(const DeviceArgumentsHeader& header) {
  if (header.block_count == 1) return 0;
#if defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(header.ticket)
               : "memory");
  return before;
#else
  return atomicAdd(header.ticket, 1u);
#endif
}

// `grad` is that of `slot`, if the block updates a tile of it.
RECAP_DEVICE void find(const DeviceArgumentsHeader& header, SlotGrad grad, uint32_t slot,
                       Found& found) {
  const uint32_t last = header.block_count - 1;
  found.skips = header.found_inf && load_before_ticket<float>(header.found_inf) != 0.0f;
  found.step = header.rates.step ? load_before_ticket<int64_t>(header.rates.step) : 0;
  if (!grad.bits) {
    found.is_last = take_ticket(header) == last;
    return;
  }
  const DeviceGroup& group = table<DeviceGroup>(header, header.groups)[grad.entry()];
  const double count = load_before_ticket<float>(header.counts + slot);
  const double lr = learning_rate(group);
  const double grad_scale = header.grad_scale ? load_before_ticket<float>(header.grad_scale) : 1.0;
  const uint32_t ticket = take_ticket(header);
  const StepInputs inputs = {lr, count + 1.0, count == 0.0, gradient_factor(grad_scale, 1.0)};
  const auto correction = [](double beta, double step) { return bias_correction(beta, step); };
  compute_values(group.hyper, inputs, correction, found.values);
  found.is_last = ticket == last;
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
    prefetch_entry(tile);
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
