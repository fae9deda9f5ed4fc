#include "device_norm.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <tuple>

namespace recap {

std::vector<at::Tensor> sums_of_squares(const std::vector<SlotTensors>& slots,
                                        std::vector<Probe>& probes, const StepGradients& gradients,
                                        const std::vector<uint32_t>& part_of_slot, size_t parts) {
  // torch's kernel takes tensors of one device and dtype at a time.
  using Kind = std::tuple<uint32_t, at::Device, at::ScalarType>;
  const auto before = [](const Kind& a, const Kind& b) {
    const auto key = [](const Kind& kind) {
      const auto& [part, device, dtype] = kind;
      return std::tuple(part, device.type(), device.index(), dtype);
    };
    return key(a) < key(b);
  };
  std::map<Kind, std::vector<at::Tensor>, decltype(before)> of_kind(before);
  at::Device device = at::kCPU;
  for (size_t i = slots.size(); i-- > 0;) {
    if (slots[i].is_inert()) continue;
    device = slots[i].param().device();
    if (!gradients.has(i) || slots[i].param().numel() == 0) continue;
    const at::Tensor grad = gradients.is_sparse(i) ? probes[i].grad().detach().coalesce().values()
                                                   : slots[i].grad().detach();
    of_kind[{part_of_slot.at(i), grad.device(), grad.scalar_type()}].push_back(grad);
  }
  std::vector<at::Tensor> sums(parts);
  for (at::Tensor& sum : sums) sum = at::zeros({}, at::TensorOptions(device).dtype(at::kDouble));
  for (const auto& [kind, tensors] : of_kind) {
    const auto& [part, own_device, dtype] = kind;
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor norms = at::stack(at::_foreach_norm(tensors, 2, wide)).to(at::kDouble);
    sums[part] += norms.square().sum().to(device);
  }
  return sums;
}

}  // namespace recap
