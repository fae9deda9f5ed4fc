// What a param group says of how its parameters and their states are stored.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../numerics/codes.h"
#include "../plan/format.h"
#include "python.h"

namespace recap {

std::optional<Dtype> dtype_of(at::ScalarType type);
at::ScalarType scalar_type_of(Dtype dtype);

// From so many elements on, a contiguous parameter has states of 8 bits; others have float32.
constexpr int64_t kFewestWithCodes = 4096;

struct FormatOptions {
  bool are_given = false;      // the group has one of the keys, whatever it says
  std::optional<Dtype> state;  // `state_dtype`; none: that of the parameter
  bool eight_bits = false;     // `state_dtype` is "8bit"
  bool master_weights = false;
  bool stochastic_rounding = false;
  int64_t seed = 0;  // `rounding_seed`

  bool operator==(const FormatOptions& other) const {
    return state == other.state && eight_bits == other.eight_bits &&
           master_weights == other.master_weights &&
           stochastic_rounding == other.stochastic_rounding && seed == other.seed;
  }

  // The format of a parameter that has gradients of dtype `grad`, and states or not; none if all is
  // stored alike, and rounded to nearest. `takes_codes`: states may be of 8 bits. `name` is the
  // parameter's, on which its chances depend.
  std::optional<Format> of(Dtype param, Dtype grad, bool has_states, bool takes_codes,
                           const std::string& name) const;
};

// The state with what a parameter of two parts has beside its own; null: it is of one.
const char* rest_name(const Format& format);
at::ScalarType rest_type(const Format& format);

// The state with the scales of that one, if it is of 8 bits.
const char* scale_name(const char* state);

inline int64_t scale_count(int64_t elements) {
  return (elements + kElementsOfScale - 1) / kElementsOfScale;
}

}  // namespace recap
