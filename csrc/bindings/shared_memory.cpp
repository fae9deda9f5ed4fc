#include "shared_memory.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace recap {
namespace {

// From the first to the last byte of a parameter, with gaps or without.
struct Extent {
  uintptr_t begin, end;
  bool dense;
  size_t slot;
  const at::Tensor* tensor;
};

using Pairs = std::vector<std::pair<size_t, size_t>>;

Extent extent_of(const at::Tensor& tensor, size_t slot) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const auto bytes = (last + 1) * static_cast<int64_t>(tensor.element_size());
  return {begin, begin + bytes, tensor.is_non_overlapping_and_dense(), slot, &tensor};
}

// Calls `function` with the address of each element.
template <typename Function>
void each_element(const at::Tensor& tensor, uintptr_t begin, int64_t dim, Function& function) {
  if (dim == tensor.dim()) {
    function(begin);
    return;
  }
  const auto stride = static_cast<uintptr_t>(tensor.stride(dim)) * tensor.element_size();
  for (int64_t i = 0; i < tensor.size(dim); ++i) {
    each_element(tensor, begin + i * stride, dim + 1, function);
  }
}

// The memory of some extents that overlap, in units of which every element is made of whole ones.
class Units {
 public:
  Units(const Extent* first, const Extent* last) : begin_(first->begin) {
    uintptr_t end = begin_;
    for (const Extent* extent = first; extent != last; ++extent) {
      unit_ = std::gcd(unit_,
                       std::gcd<uintptr_t>(extent->begin - begin_, extent->tensor->element_size()));
      end = std::max(end, extent->end);
    }
    taken_.assign((end - begin_) / unit_, false);
  }

  // Takes the elements of a tensor; returns whether one was taken already.
  bool take(const Extent& extent) {
    bool found = false;
    const size_t width = extent.tensor->element_size() / unit_;
    auto take_element = [&](uintptr_t address) {
      const size_t unit = (address - begin_) / unit_;
      for (size_t i = unit; i < unit + width; ++i) {
        found |= taken_[i];
        taken_[i] = true;
      }
    };
    each_element(*extent.tensor, extent.begin, 0, take_element);
    return found;
  }

 private:
  uintptr_t begin_, unit_ = 0;
  std::vector<bool> taken_;
};

bool share(const Extent& a, const Extent& b) {  // they overlap
  if (a.dense && b.dense) return true;
  const Extent both[] = {a, b};
  Units units(both, both + 2);
  units.take(a);
  return units.take(b);
}

// Of extents in order, each of which overlaps with those before it.
void find_pairs(const Extent* first, const Extent* last, Pairs& pairs) {
  const auto has_gaps = [](const Extent& extent) { return !extent.dense; };
  if (std::any_of(first, last, has_gaps)) {  // mostly, nobody shares: one look at each will do
    Units units(first, last);
    const auto is_shared = [&](const Extent& extent) { return units.take(extent); };
    if (std::none_of(first, last, is_shared)) return;
  }
  for (const Extent* a = first; a != last; ++a) {
    for (const Extent* b = a + 1; b != last && b->begin < a->end; ++b) {
      if (share(*a, *b)) pairs.emplace_back(a->slot, b->slot);
    }
  }
}

}  // namespace

SharedMemory::SharedMemory(const std::vector<SlotTensors>& slots) {
  std::map<const void*, size_t> seen;
  std::vector<Extent> extents;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].is_inert()) continue;
    const at::Tensor& param = slots[i].param();
    const auto [first, is_new] = seen.emplace(param.unsafeGetTensorImpl(), i);
    if (!is_new) {
      pairs_.emplace_back(first->second, i);
    } else if (param.numel() > 0) {
      extents.push_back(extent_of(param, i));
    }
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t begin = 0, end = 0; begin < extents.size(); begin = end) {
    uintptr_t reached = extents[begin].end;
    for (end = begin + 1; end < extents.size() && extents[end].begin < reached; ++end) {
      reached = std::max(reached, extents[end].end);
    }
    if (end - begin > 1) find_pairs(&extents[begin], &extents[begin] + (end - begin), pairs_);
  }
}

void SharedMemory::refuse(const std::vector<SlotTensors>& slots,
                          const StepGradients& gradients) const {
  for (const auto& [a, b] : pairs_) {
    if (!gradients.has(a) || !gradients.has(b)) continue;
    throw py::value_error("parameters " + slots[a].name() + " and " + slots[b].name() +
                          " share memory; pass each parameter once, in one param group");
  }
}

}  // namespace recap
