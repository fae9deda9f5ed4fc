// The table of loops that one instruction set offers.
#pragma once

#include "ahead.h"

namespace recap::cpu {

// The elements [0, size) of each array are updated.
struct Arrays {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t size;
};

using Kernel = void (*)(const Values& values, const Arrays& arrays, Ahead& ahead);

// Squares and sums in double, in an order that is the same for every instruction set.
using SumOfSquares = double (*)(const void* elements, int64_t size);

struct Kernels {
  const char* instruction_set;
  Kernel of[kDtypes][kUpdates];
  SumOfSquares sum_of_squares[kDtypes];
};

// Those in use.
const Kernels& kernels();

extern const Kernels kernels_baseline;
#if defined(RECAP_WITH_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace recap::cpu
