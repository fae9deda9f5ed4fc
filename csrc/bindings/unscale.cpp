#include "unscale.h"

#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "local_tensor.h"
#include "scalar.h"

namespace recap {
namespace {

// A gradient's memory, from its first to its last element.
struct GradientExtent {
  const char *begin, *end;
  at::Tensor gradient;
  bool shared = false;  // with another, or among its own elements
};

// `gradient` has elements.
GradientExtent gradient_extent_of(const at::Tensor& gradient) {
  int64_t elements = 1;
  for (int64_t dim = 0; dim < gradient.dim(); ++dim) {
    elements += (gradient.size(dim) - 1) * gradient.stride(dim);
  }
  const auto* const begin = static_cast<const char*>(gradient.const_data_ptr());
  const bool writable = gradient.is_non_overlapping_and_dense() && !is_lazy(gradient);
  return {begin, begin + elements * gradient.element_size(), gradient, !writable};
}

// One for each gradient whose memory is to be written, in the order of their addresses.
std::vector<GradientExtent> gradient_extents_of(const std::vector<ScaledGradient>& gradients) {
  std::vector<GradientExtent> extents;
  for (const ScaledGradient& gradient : gradients) {
    const at::Tensor& local = gradient.local;
    // An efficient zero has no memory, and is zero at any scale.
    if (local.numel() == 0 || local._is_zerotensor()) continue;
    extents.push_back(gradient_extent_of(local));
  }
  std::sort(extents.begin(), extents.end(), [](const GradientExtent& a, const GradientExtent& b) {
    return std::tuple(a.begin, a.gradient.unsafeGetTensorImpl()) <
           std::tuple(b.begin, b.gradient.unsafeGetTensorImpl());
  });
  const auto same = [](const GradientExtent& a, const GradientExtent& b) {
    return a.gradient.is_same(b.gradient);
  };
  extents.erase(std::unique(extents.begin(), extents.end(), same), extents.end());
  size_t last = 0;  // of those so far, the one that ends last
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[last].end) extents[i].shared = extents[last].shared = true;
    if (extents[i].end > extents[last].end) last = i;
  }
  return extents;
}

// What to multiply by.
at::Tensor reciprocal(const py::object& scale, const py::object& found_inf, at::Device device) {
  const at::Tensor inverse =
      scalar_on(scale, "grad_scale", device).to(at::kDouble).reciprocal().to(at::kFloat);
  if (found_inf.is_none()) return inverse;
  const at::Tensor found = scalar_on(found_inf, "found_inf", device);
  return at::where(found.ne(0), at::ones_like(inverse), inverse);
}

}  // namespace

void unscale_gradients(const std::vector<ScaledGradient>& gradients, const py::object& scale,
                       const py::object& found_inf) {
  // Gradients may require gradients themselves, or have been made in inference mode.
  const c10::InferenceMode no_autograd;
  using Kind = std::tuple<at::DeviceType, at::DeviceIndex, at::ScalarType>;  // of one launch
  std::map<Kind, std::vector<at::Tensor>> plain;
  std::vector<std::pair<at::Tensor, at::Tensor>> copied;
  for (const GradientExtent& extent : gradient_extents_of(gradients)) {
    at::Tensor gradient = extent.gradient;
    if (extent.shared) {
      // The operator takes no tensor whose elements share memory, and would come by twice.
      const at::Tensor elements = distinct_elements(gradient);
      gradient = at::empty(elements.sizes(), elements.options()).copy_(elements);
      copied.emplace_back(elements, gradient);
    }
    const at::Device device = gradient.device();
    plain[{device.type(), device.index(), gradient.scalar_type()}].push_back(gradient);
  }
  for (const auto& [kind, tensors] : plain) {
    const at::Device device = tensors.front().device();
    at::Tensor ignored = at::zeros({}, at::TensorOptions(device).dtype(at::kFloat));
    const at::Tensor inverse = reciprocal(scale, found_inf, device);
    const py::gil_scoped_release release;
    at::_amp_foreach_non_finite_check_and_unscale_(tensors, ignored, inverse);
  }
  for (const auto& [elements, values] : copied) elements.copy_(values);
  // The operator leaves versions alone.
  for (const ScaledGradient& gradient : gradients) bump_versions(gradient.whole, gradient.local);
}

}  // namespace recap
