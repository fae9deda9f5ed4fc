// A twin whose CUDA side computes its values from numbers in device memory, and whose CPU side is
// given the values that the host computes from its own record of the same numbers.
#pragma once

#include <limits>

#include "twin.h"

class DeviceTwin {
 public:
  Twin twin;
  recap::cuda::DeviceStep step;
  float grad_scale = 3, found_inf = 0;

  // Groups are by update and by whether decay rates are slow; tensors start after `step` - 1 steps.
  explicit DeviceTwin(const std::vector<Tensor>& tensors, uint32_t seed = 1)
      : twin(tensors, seed), counts_(tensors.size() * sizeof(float), 0) {
    for (const Tensor& tensor : tensors) {
      const auto [group, added] =
          groups_.emplace(std::make_pair(tensor.update, tensor.step % 2 != 0), groups_.size());
      if (added) add_group(hyper_for(tensor.update, tensor.step % 2 != 0));
      step.group_of_slot.push_back(static_cast<uint32_t>(group->second));
      expected_counts_.push_back(static_cast<float>(tensor.step - 1));
    }
    float_rates_.resize(groups_.size());
    double_rates_.resize(groups_.size());
    set_rate(0.1);
    step.counts = reinterpret_cast<float*>(counts_.data());
    std::copy(expected_counts_.begin(), expected_counts_.end(), step.counts);
    step.grads = twin.cuda.step.grads;
    step.grad_scale = &grad_scale;
    step.found_inf = &found_inf;
    twin.cpu.step.values_of_slot.clear();
    for (uint32_t slot = 0; slot < tensors.size(); ++slot) {
      twin.cpu.step.values_of_slot.push_back(slot);
    }
  }

  // The rate of every third group comes from the host, from a float and from a double; of the last
  // two, the host's must not matter.
  void set_rate(double rate) {
    for (size_t i = 0; i < step.groups.size(); ++i) {
      recap::cuda::DeviceGroup& group = step.groups[i];
      group.hyper.lr = i % 3 == 0 ? rate : std::numeric_limits<double>::quiet_NaN();
      float_rates_[i] = static_cast<float>(rate);
      double_rates_[i] = rate;
      if (i % 3 == 1) group.lr = &float_rates_[i];
      if (i % 3 == 2) group.lr = &double_rates_[i];
      group.lr_is_double = i % 3 == 2;
    }
  }

  double rate_of(size_t group) const {
    const recap::cuda::DeviceGroup& g = step.groups[group];
    if (!g.lr) return g.hyper.lr;
    return g.lr_is_double ? *static_cast<const double*>(g.lr) : *static_cast<const float*>(g.lr);
  }

  // The step on the CPU, with the rates, scale and found_inf of now.
  void run_cpu() {
    if (found_inf != 0) return;
    recap::Step& cpu = twin.cpu.step;
    cpu.values.resize(step.grads.size());
    for (size_t slot = 0; slot < step.grads.size(); ++slot) {
      if (!step.grads[slot]) continue;
      recap::Hyper hyper = step.groups[step.group_of_slot[slot]].hyper;
      hyper.lr = rate_of(step.group_of_slot[slot]);
      float& count = expected_counts_[slot];
      cpu.values[slot] =
          recap::make_values(hyper, count + 1.0, count == 0, step.grad_scale ? grad_scale : 1.0);
      count += 1;
    }
    twin.run_cpu();
  }

  std::string difference() {
    if (!counts_.intact()) return "something beside the counts was written";
    for (size_t slot = 0; slot < expected_counts_.size(); ++slot) {
      if (step.counts[slot] != expected_counts_[slot]) {
        return "slot " + std::to_string(slot) + " counts " + std::to_string(step.counts[slot]) +
               " and not " + std::to_string(expected_counts_[slot]) + " steps";
      }
    }
    return twin.difference();
  }

 private:
  void add_group(const recap::Hyper& hyper) {
    step.groups.emplace_back();
    step.groups.back().hyper = hyper;
  }

  std::map<std::pair<Update, bool>, size_t> groups_;
  std::vector<float> float_rates_;
  std::vector<double> double_rates_;
  Guarded counts_;
  std::vector<float> expected_counts_;
};
