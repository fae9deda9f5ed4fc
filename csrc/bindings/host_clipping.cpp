#include "host_clipping.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "thread_pool.h"

namespace recap {

double HostClipping::factor(const Plan& plan, const Step& step, double grad_scale, bool found_inf,
                            bool gives_up_gil) {
  const std::vector<double>& sums = [&]() -> const std::vector<double>& {
    std::optional<py::gil_scoped_release> release;
    if (gives_up_gil) release.emplace();
    return sums_.sums_of_squares(plan, step, part_of_slot_, parts_, torch_thread_pool());
  }();
  double total = 0.0;
  if (total_.is_none()) {
    for (const double sum : sums) total += sum;
  } else {
    // Also with found_inf, which the others may not have seen: they wait for this one.
    py::list parts;
    for (const double sum : sums) {
      parts.append(found_inf ? std::numeric_limits<double>::infinity() : sum);
    }
    total = total_(parts).cast<double>();
  }
  norm_ = std::sqrt(total) / grad_scale;
  if (found_inf || !std::isfinite(norm_)) return std::numeric_limits<double>::quiet_NaN();
  return std::min(1.0, max_norm_ / (norm_ + 1e-6));
}

}  // namespace recap
