// The update of a tile, whatever its algorithm, dtype and format: what both kernels call.
#pragma once

#include "format_update.cuh"
#include "tile_update.cuh"

namespace recap::cuda {

// `float32` and `float64` hold the same values; which of them are read follows from the dtype.
// `step` is read only if the tile has a format that draws.
RECAP_DEVICE void update_any_tile(const TileEntry& tile, const FormatEntry* formats, Update update,
                                  const UpdateValues<float>& float32,
                                  const UpdateValues<double>& float64, const uint64_t* step,
                                  const void* grad) {
  if (tile.has_format) return update_tile_in_format(update, float32, tile, formats, grad, step);
  switch (tile.dtype) {
    case Dtype::float32: return update_tile_by<float>(update, float32, tile, grad);
    case Dtype::float64: return update_tile_by<double>(update, float64, tile, grad);
    case Dtype::bfloat16: return update_tile_by<BFloat16>(update, float32, tile, grad);
    case Dtype::float16: return update_tile_by<Float16>(update, float32, tile, grad);
  }
}

// Leaves zeros in the gradient of a tile that was updated, or whose step is skipped.
RECAP_DEVICE void clear_grad_of_any_tile(const TileEntry& tile, const FormatEntry* formats,
                                         const void* grad) {
  if (tile.has_format) {
    clear_grad_in_format(tile, formats, grad);
  } else {
    clear_grad(tile, grad);
  }
}

}  // namespace recap::cuda
