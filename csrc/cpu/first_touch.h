// Where the pages of fresh memory lie, on a machine with several memory nodes: at that of the
// thread that first writes to them.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace recap::cpu {

// Which part of a step some memory has a part in, both from 0 to 1: of all bytes of parameters, in
// the order of the plan.
struct Share {
  double begin, end;
};

// Writes a zero to every page of `memory`, which is fresh and of zeros, by the thread that steps
// what is there in a step in which all parameters have a gradient.
void touch_pages(void* memory, int64_t bytes, Share share, const ThreadPool& pool);

}  // namespace recap::cpu
