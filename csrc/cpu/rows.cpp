#include "rows.h"

#include <algorithm>
#include <cstring>

#include "row_kernels.h"

namespace recap::cpu {
namespace {

// So many bytes of gradient are looked at before the rows in them are updated, and as many more are
// asked for: together with the arrays of the rows they stay in the cache.
constexpr int64_t kChunkBytes = 4096;
constexpr int64_t kMaxRows = kChunkBytes / 2;

bool is_rowwise(Update update) { return static_cast<int>(update) >= kUpdates; }

int64_t compute_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// The rows of one tile.
class RowTile {
 public:
  RowTile(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad)
      : values_(values),
        arrays_(slot, slot.row_size, values.update),
        grad_(static_cast<const char*>(grad)),
        size_(slot.row_size),
        is_zero_(kernels.rows->is_zero[static_cast<int>(slot.dtype)]) {
    const int dtype = static_cast<int>(slot.dtype);
    switch (values.update) {
      case Update::rowwise_adagrad: of_row_ = kernels.rows->rowwise_adagrad[dtype]; break;
      case Update::rowwise_adagrad_l2: of_row_ = kernels.rows->rowwise_adagrad_l2[dtype]; break;
      default: of_rows_ = kernels.of[dtype][static_cast<int>(values.update)]; break;
    }
  }

  void run(int64_t begin, int64_t end) {
    const int64_t step = std::clamp(kChunkBytes / arrays_.row_bytes(), int64_t{1}, kMaxRows);
    bool* current = touched_[0];
    bool* next = touched_[1];
    look(begin, std::min(begin + step, end), current);
    for (int64_t row = begin; row < end; row += step) {
      const int64_t middle = std::min(row + step, end);
      look(middle, std::min(middle + step, end), next);
      update(row, middle, current);
      std::swap(current, next);
    }
  }

 private:
  const char* grad_of(int64_t row) const { return grad_ + row * arrays_.row_bytes(); }

  void look(int64_t begin, int64_t end, bool* touched) const {
    for (int64_t row = begin; row < end; ++row) {
      const bool is_touched = !is_zero_(grad_of(row), size_);
      touched[row - begin] = is_touched;
      if (is_touched) arrays_.prefetch(row);
    }
  }

  void update(int64_t begin, int64_t end, const bool* touched) {
    int64_t row = begin;
    while (row < end) {
      if (!touched[row - begin]) {
        ++row;
        continue;
      }
      const int64_t first = row;
      while (row < end && touched[row - begin]) ++row;
      if (of_rows_) {
        of_rows_(values_, arrays_.at(first, grad_of(first), row - first), no_prefetch_);
      } else {
        for (int64_t i = first; i < row; ++i) {
          of_row_(values_, arrays_.at(i, grad_of(i)));
          if (values_.clears_grads)
            std::memset(const_cast<char*>(grad_of(i)), 0, arrays_.row_bytes());
        }
      }
    }
  }

  const Values& values_;
  const RowArrays arrays_;
  const char* const grad_;
  const int64_t size_;
  const IsZero is_zero_;
  Kernel of_rows_ = nullptr;  // of several at once
  RowKernel of_row_ = nullptr;
  Prefetch no_prefetch_ = Prefetch::none();
  bool touched_[2][kMaxRows];
};

}  // namespace

RowArrays::RowArrays(const Slot& slot, int64_t row_size, Update update)
    : slot_(slot), row_size_(row_size), row_bytes_(row_size * dtype_size(slot.dtype)) {
  state_bytes_ = is_rowwise(update) ? compute_size(slot.dtype) : row_bytes_;
  states_ = static_cast<int>(std::count_if(slot.state, slot.state + kMaxStates,
                                           [](const void* state) { return state != nullptr; }));
}

void run_row_tile(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                  const Tile& tile) {
  RowTile(kernels, slot, values, grad)
      .run(tile.begin / slot.row_size, (tile.begin + tile.size) / slot.row_size);
}

}  // namespace recap::cpu
