// The table of loops over one row that one instruction set offers, beside those of kernels.h.
#pragma once

#include "kernels.h"

namespace recap::cpu {

// The row's elements, and of state 0 the one number of the row.
using RowKernel = void (*)(const Values& values, const Arrays& row);

// Whether all elements are 0 or -0.
using IsZero = bool (*)(const void* row, int64_t size);

// `sum` has the type in which the row's type is updated. `first` is whether the row is the first
// that is summed.
using AddRow = void (*)(const void* row, bool first, void* sum, int64_t size);

struct RowKernels {
  // A gradient of the row's own type, or a sum of such rows in the type of the update.
  RowKernel rowwise_adagrad[kDtypes];
  RowKernel rowwise_adagrad_l2[kDtypes];
  RowKernel rowwise_adagrad_of_sum[kDtypes];
  RowKernel rowwise_adagrad_l2_of_sum[kDtypes];
  // The updates of elements by such a sum.
  Kernel of_sum[kDtypes][kUpdates];
  IsZero is_zero[kDtypes];
  AddRow add[kDtypes];
};

extern const RowKernels row_kernels_baseline;
#if defined(RECAP_WITH_X86)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

}  // namespace recap::cpu
