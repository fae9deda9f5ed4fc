// The slow, obvious engine: one element after another, straight from the algorithms.
#pragma once

#include "plan/plan.h"
#include "plan/step.h"

namespace scalar {

void update(const recap::Values& values, const recap::Slot& slot, const void* grad);
void run(const recap::Plan& plan, const recap::Step& step);

}  // namespace scalar
