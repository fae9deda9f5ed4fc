// What an algorithm says of itself, so that whatever binds it to param groups, plans and engines
// can go by it. Its struct of traits (AdamTraits is one) has:
//
//   Hyper         the options of a param group, but for `lr` and `maximize`, which all have
//   Values<T>     what one step uses of them; computed in double, converted by `to_float`
//   kOptions      where the options are in a param group and in Hyper
//   kCounts       whether the state has a `step`, which counts from 1 in the first step
//   kTakesSparse  whether it can update by a sparse gradient
//   states(h)     names of the state tensors, as torch.optim names them, in the order of its
//   updates shape(h)      a number that changes where another plan is needed: other states, or by
//   rows update<U>(h)  which of its updates in updates.h a step takes; U is the enum of these
//   values(h, inputs, grad_factor, correction)
#pragma once

#include <cstddef>
#include <cstdint>

#include "../numerics/arithmetic.h"

namespace recap {

constexpr int kMaxStates = 3;

// Where a slot stands at a step, and what stands in the place of its group's learning rate.
struct StepInputs {
  double lr;
  double step;    // counts from 1
  bool first;     // an SGD momentum buffer is new
  double factor;  // of gradients; see `gradient_factor`
};

enum class OptionKind : uint8_t {
  number,
  decay_rate,   // in [0, 1)
  decay_rates,  // a pair of them, one behind the other in Hyper
  flag,
};

struct Option {
  const char* key;
  OptionKind kind;
  size_t offset;  // in Hyper
  bool required = true;
};

struct StateNames {
  const char* names[kMaxStates] = {};
  int count = 0;

  constexpr StateNames() = default;
  template <typename... Names>
  constexpr explicit StateNames(Names... all) : names{all...}, count(sizeof...(all)) {}

  constexpr void add(const char* name) { names[count++] = name; }
  const char* const* begin() const { return names; }
  const char* const* end() const { return names + count; }
};

}  // namespace recap
