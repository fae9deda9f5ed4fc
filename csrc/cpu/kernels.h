// The table of loops that one instruction set offers.
#pragma once

#include "prefetch.h"
#include "tuner.h"

// The name of this instruction set's table of a kind, in sources that are compiled for several.
#define RECAP_JOIN(a, b) a##_##b
#define RECAP_TABLE_OF(kind, set) RECAP_JOIN(kind, set)
#define RECAP_TABLE(kind) RECAP_TABLE_OF(kind, RECAP_INSTRUCTION_SET)

namespace recap::cpu {

// The elements [0, size) of each array are updated.
struct Arrays {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t size;
};

// Updates all of them, with requests for the memory of the next tensors.
using Kernel = void (*)(const Values& values, const Arrays& arrays, Prefetch& prefetch);

// The same for the middle of a long tensor, in the given way, without these requests.
using MiddleKernel = void (*)(const Values& values, const Arrays& arrays, Way way);

// Squares and sums in double, in an order that is the same for every instruction set.
using SumOfSquares = double (*)(const void* elements, int64_t size);

struct RowKernels;  // in row_kernels.h

struct Kernels {
  const char* instruction_set;
  Kernel of[kDtypes][kUpdates];
  MiddleKernel middle_of[kDtypes][kUpdates];
  SumOfSquares sum_of_squares[kDtypes];
  const RowKernels* rows;
  const Kernels* narrow;  // with vectors of half the width; null: no instruction set for it
};

// Those in use.
const Kernels& kernels();

extern const Kernels kernels_baseline;
#if defined(RECAP_WITH_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace recap::cpu
