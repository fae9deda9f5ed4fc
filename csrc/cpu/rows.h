// Updates of whole rows by a gradient that has them all: rows whose gradient is zero stay as they
// are, parameter and states.
#pragma once

#include "kernels.h"

namespace recap::cpu {

// Where the arrays of one row begin. A state of row-wise Adagrad has one number for each row.
class RowArrays {
 public:
  RowArrays(const Slot& slot, int64_t row_size, Update update);

  // The rows from `row` on, `count` of them, with the gradient that is at `grad`.
  RECAP_INLINE Arrays at(int64_t row, const void* grad, int64_t count = 1) const {
    Arrays arrays = {};
    arrays.param = static_cast<char*>(slot_.param) + row * row_bytes_;
    arrays.grad = grad;
    for (int k = 0; k < states_; ++k) {
      arrays.state[k] = static_cast<char*>(slot_.state[k]) + row * state_bytes_;
    }
    arrays.size = count * row_size_;
    return arrays;
  }

  // Asks for all of a row but its gradient.
  RECAP_INLINE void prefetch(int64_t row) const {
    prefetch_all(static_cast<const char*>(slot_.param) + row * row_bytes_, row_bytes_);
    for (int k = 0; k < states_; ++k) {
      prefetch_all(static_cast<const char*>(slot_.state[k]) + row * state_bytes_, state_bytes_);
    }
  }

  int64_t row_bytes() const { return row_bytes_; }

 private:
  static RECAP_INLINE void prefetch_all(const char* begin, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(begin + line, 1);
    __builtin_prefetch(begin + bytes - 1, 1);
  }

  const Slot& slot_;
  int64_t row_size_, row_bytes_, state_bytes_;
  int states_;
};

// Updates the rows of a tile of a slot that has a row size.
void run_row_tile(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                  const Tile& tile);

}  // namespace recap::cpu
