// One optimizer step with values from the host.
//
//  * One block per tile, not a persistent grid: tiles differ in cost (algorithm, dtype, slots
//    without a gradient), and the hardware hands the next to whichever multiprocessor is free.
//  * A block waits for one table entry, then asks for elements: addresses and sizes come with the
//    entry, the gradient's address and the hyperparameters with the kernel's parameter.
//  * No shared memory and no synchronisation: there is nothing to exchange.
#include "any_tile.cuh"
#include "kernel.h"

namespace recap::cuda {
namespace {

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_tiles(const Arguments<ArgumentsHeader, kBytes> __grid_constant__ arguments) {
  const ArgumentsHeader& header = arguments.header;
  // A reference: as a copy, its unused parts would hold registers.
  const TileEntry& tile = header.tiles[blockIdx.x];
  prefetch_entry(&tile);
  const uint32_t slot = tile.slot - header.first_slot;
  const SlotGrad grad = table<SlotGrad>(header, header.grads)[slot];
  if (!grad.bits) return;
  const uint32_t entry = grad.entry();
  const EntryUpdate update = table<EntryUpdate>(header, header.updates)[entry];
  update_any_tile(tile, header.formats, update.update(),
                  table<UpdateValues<float>>(header, header.float32_values)[entry],
                  table<UpdateValues<double>>(header, header.float64_values)[entry],
                  table<uint64_t>(header, header.steps) + entry, grad.address());
  if (header.clears_grads) {
    // All is read anew: kept until here, it would take registers from the update.
    const TileEntry& again = header.tiles[block_number()];
    const SlotGrad of_slot = table<SlotGrad>(header, header.grads)[again.slot - header.first_slot];
    if (table<EntryUpdate>(header, header.updates)[of_slot.entry()].clears_grads()) {
      clear_grad_of_any_tile(again, header.formats, of_slot.address());
    }
  }
}

template <int kBytes>
cudaError_t launch_with_host_values(unsigned blocks, void* arguments, cudaStream_t stream) {
  return cudaLaunchKernel(update_tiles<kBytes>, dim3(blocks), dim3(kThreads), &arguments, 0,
                          stream);
}

}  // namespace

cudaError_t launch_host_values_kernel(size_t bytes, unsigned blocks, void* arguments,
                                      cudaStream_t stream) {
  return bytes <= kSmallArguments
             ? launch_with_host_values<kSmallArguments>(blocks, arguments, stream)
             : launch_with_host_values<kLargeArguments>(blocks, arguments, stream);
}

}  // namespace recap::cuda
