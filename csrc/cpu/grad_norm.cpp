#include "grad_norm.h"

#include "kernels.h"
#include "sparse.h"
#include "tile_ranges.h"

namespace recap::cpu {

const std::vector<double>& GradNorm::sums_of_squares(const Plan& plan, const Step& step,
                                                     const std::vector<uint32_t>& part_of_slot,
                                                     size_t parts, const ThreadPool& pool) {
  of_tile_.resize(plan.tiles.size());
  struct Context {
    const Kernels& kernels;
    const Plan& plan;
    const Step& step;
    double* of_tile;
  } context{kernels(), plan, step, of_tile_.data()};
  run_tile_ranges(
      plan, step, pool,
      [](size_t begin, size_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        for (size_t i = begin; i < end; ++i) {
          const Tile& tile = c.plan.tiles[i];
          const void* const grad = c.step.grads[tile.slot];
          if (!grad) {
            i += tiles_left(c.plan.slots[tile.slot], tile) - 1;
            continue;
          }
          const Dtype dtype = grad_dtype(c.plan.slots[tile.slot]);
          const char* const first = static_cast<const char*>(grad) + tile.begin * dtype_size(dtype);
          c.of_tile[i] = c.kernels.sum_of_squares[static_cast<int>(dtype)](first, tile.size);
        }
      },
      &context);

  sums_.assign(parts, 0.0);
  errors_.assign(parts, 0.0);
  const auto add = [this](uint32_t part, double term) {
    const double sum = sums_[part] + term;
    // Knuth's two-sum: what the addition rounded away.
    const double back = sum - sums_[part];
    errors_[part] += (sums_[part] - (sum - back)) + (term - back);
    sums_[part] = sum;
  };
  for (size_t i = 0; i < plan.tiles.size(); ++i) {
    const uint32_t slot = plan.tiles[i].slot;
    if (step.grads[slot]) {
      add(part_of_slot[slot], of_tile_[i]);
    } else {
      i += tiles_left(plan.slots[slot], plan.tiles[i]) - 1;
    }
  }
  if (!step.sparse.empty()) {
    sums_of_squares_of_rows(plan, step, pool, of_rows_, ends_);
    size_t row_sum = 0;
    for (size_t i = 0; i < step.sparse.size(); ++i) {
      const uint32_t part = part_of_slot[step.sparse[i].slot];
      for (; row_sum < ends_[i]; ++row_sum) add(part, of_rows_[row_sum]);
    }
  }
  for (size_t part = 0; part < parts; ++part) {
    // Of an infinite sum the error is NaN.
    if (sums_[part] - sums_[part] == 0.0) sums_[part] += errors_[part];
  }
  return sums_;
}

}  // namespace recap::cpu
