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

// So many elements of a slot with a format are updated between two requests for later memory; tiles
// consist of them, and they of blocks with a scale.
constexpr int64_t kPiece = 1024;

// The elements [0, size) of such a slot. The first is that with `index` in the whole
// parameter; `key` is that of the step.
struct MixedArrays {
  Arrays arrays;
  void* rest;
  float* scale[kMaxStates];
  Dtype dtype;
  const Format* format;
  uint64_t index;
  uint64_t key;
};

// Updates all of them, at most kPiece.
using MixedKernel = void (*)(const Values& values, const MixedArrays& arrays);

struct RowKernels;  // in row_kernels.h

struct Kernels {
  const char* instruction_set;
  Kernel of[kDtypes][kUpdates];
  MiddleKernel middle_of[kDtypes][kUpdates];
  SumOfSquares sum_of_squares[kDtypes];
  const RowKernels* rows;
  const MixedKernel* mixed_of;  // by update
  const Kernels* narrow;        // with vectors of half the width; null: no instruction set for it
};

// Those in use.
const Kernels& kernels();

extern const Kernels kernels_baseline;
extern const MixedKernel mixed_kernels_baseline[kUpdates];
#if defined(RECAP_WITH_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const MixedKernel mixed_kernels_avx2[kUpdates];
extern const MixedKernel mixed_kernels_avx512[kUpdates];
#endif

}  // namespace recap::cpu
