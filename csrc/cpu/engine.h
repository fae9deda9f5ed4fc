// The CPU engine: runs the tiles of a plan over a thread pool that the caller lends.
#pragma once

#include <string>
#include <vector>

#include "../plan/plan.h"
#include "../plan/step.h"
#include "thread_pool.h"

namespace recap::cpu {

constexpr int64_t kTileSize = 8192;  // elements

// Updates every slot of `plan` that has a gradient in `step`.
void run(const Plan& plan, const Step& step, const ThreadPool& pool);

// The instruction sets compiled in that this processor can run, slowest first; the last is used.
std::vector<std::string> instruction_sets();

// Uses `name` from now on; an empty name means the fastest. Returns false if it is not available.
bool use_instruction_set(const std::string& name);

std::string instruction_set_in_use();

}  // namespace recap::cpu
