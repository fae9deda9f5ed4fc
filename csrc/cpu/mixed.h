// The update of mixed slots: of elements that are widened to float a piece at a time, small enough
// to stay in the first-level cache, and stored again as their format says.
#pragma once

#include "kernels.h"

namespace recap::cpu {

// As those of `Kernels`, of the elements [begin, begin + size) of a mixed slot.
void update_mixed(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                  int64_t begin, int64_t size, Prefetch& prefetch);
void update_middle_of_mixed(const Kernels& kernels, const Slot& slot, const Values& values,
                            const void* grad, int64_t begin, int64_t size, Way way);

}  // namespace recap::cpu
