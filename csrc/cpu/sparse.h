// Updates of the rows that a sparse gradient touches. Their cost grows with these, never with the
// table: what several lookups add to one row is summed first, in their order.
#pragma once

#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "thread_pool.h"

namespace recap::cpu {

// To be called once for the sparse gradients of a step, before all else.
void sort_lookups(const Step& step, const ThreadPool& pool);

// Updates the rows of all sparse gradients.
void run_sparse(const Plan& plan, const Step& step, const ThreadPool& pool);

// Sums squares of runs of summed rows, which do not depend on the threads. `sums` gets the sums of
// the first gradient, then of the next; `ends` where those of each one end.
void sums_of_squares_of_rows(const Plan& plan, const Step& step, const ThreadPool& pool,
                             std::vector<double>& sums, std::vector<size_t>& ends);

}  // namespace recap::cpu
