// One param group of a bound plan.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include "group_reader.h"
#include "python.h"
#include "snapshot.h"

namespace recap {

// As Python hands it over.
struct GroupSource {
  std::string algorithm;           // its name in ../algorithms/updates.h, or "sparse_adam"
  std::string name;                // for errors
  py::dict group;                  // the torch param group
  py::dict state;                  // the optimizer's state
  std::vector<std::string> names;  // one per parameter, for errors
  bool clears_grads;               // a step leaves its gradients at zero
};

struct DeviceOrder {
  bool operator()(at::Device a, at::Device b) const { return a.index() < b.index(); }
};
using CudaDevices = std::set<at::Device, DeviceOrder>;

// Those on which the CUDA engine would step parameters of the groups.
CudaDevices cuda_devices_of(const std::vector<GroupSource>& groups);

// As the plan watches it.
struct PlanGroup {
  GroupReader reader;
  ListSnapshot params;
  size_t begin, end;  // its slots
};

}  // namespace recap
