// What a param group says of how its parameters and their states are stored.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../plan/format.h"
#include "python.h"

namespace recap {

std::optional<Dtype> dtype_of(at::ScalarType type);
at::ScalarType scalar_type_of(Dtype dtype);

struct FormatOptions {
  bool are_given = false;      // the group has one of the keys, whatever it says
  std::optional<Dtype> state;  // `state_dtype`; none: that of the parameter
  bool master_weights = false;
  bool stochastic_rounding = false;
  int64_t seed = 0;  // `rounding_seed`

  bool operator==(const FormatOptions& other) const {
    return state == other.state && master_weights == other.master_weights &&
           stochastic_rounding == other.stochastic_rounding && seed == other.seed;
  }

  // The format of a parameter that has gradients of dtype `grad`, and states or not; none if all is
  // stored alike, and rounded to nearest. `name` is the parameter's, on which its chances depend.
  std::optional<Format> of(Dtype param, Dtype grad, bool has_states, const std::string& name) const;
};

// The state with what a parameter of two parts has beside its own; null: it is of one.
const char* rest_name(const Format& format);
at::ScalarType rest_type(const Format& format);

}  // namespace recap
