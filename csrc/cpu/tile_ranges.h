// Shares the tiles of a plan out among threads.
#pragma once

#include <cstddef>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "thread_pool.h"

namespace recap::cpu {

// Calls task(begin, end, context) with ranges that cover all tiles of `plan`, one for each thread.
// Those with a gradient in `step` are of about equal bytes in each.
void run_tile_ranges(const Plan& plan, const Step& step, const ThreadPool& pool,
                     void (*task)(size_t begin, size_t end, void* context), void* context);

}  // namespace recap::cpu
