// How the arrays of a slot are stored. An algorithm knows nothing of it: loads and stores do.
#pragma once

#include <cstdint>

#include "../algorithms/traits.h"

namespace recap {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };
constexpr int kDtypes = 4;

RECAP_INLINE constexpr int64_t dtype_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::float32: return 4;
    case Dtype::bfloat16:
    case Dtype::float16: return 2;
  }
  return 0;
}

constexpr const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::float64: return "float64";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float16: return "float16";
  }
  return "";
}

// The element of an array.
inline void* element(void* array, Dtype dtype, int64_t index) {
  return static_cast<char*>(array) + index * dtype_size(dtype);
}
inline const void* element(const void* array, Dtype dtype, int64_t index) {
  return static_cast<const char*>(array) + index * dtype_size(dtype);
}

// What becomes of a 16-bit parameter after it was updated in float.
enum class ParamRounding : uint8_t {
  nearest,
  stochastic,
  remainder,  // bfloat16: nothing, since an array of int16 has what the float has more
  master,     // float16: an array of float32 has all of it
};

// Of a slot whose arrays are not all of one dtype and rounded to nearest: it is updated in float.
struct Format {
  Dtype grad = Dtype::float32;
  Dtype state = Dtype::float32;
  bool draws_for_states = false;  // they are rounded stochastically
  bool has_codes = false;         // states are codes, see numerics/codes.h, and `state` is float32
  void* scale[kMaxStates] = {};   // of states that are: float32, one for each block of elements
  ParamRounding param = ParamRounding::nearest;
  void* rest = nullptr;       // of a parameter that is stored in two arrays
  uint64_t seed = 0;          // of its chances
  int64_t first_element = 0;  // its index in the whole parameter, of which this may be a shard

  RECAP_INLINE bool draws() const { return draws_for_states || param == ParamRounding::stochastic; }
};

// Bytes of an element of a state.
RECAP_INLINE int64_t state_size(const Format& format) {
  return format.has_codes ? 1 : dtype_size(format.state);
}

// Whose size the elements of `rest` have.
inline Dtype rest_dtype(const Format& format) {
  return format.param == ParamRounding::master ? Dtype::float32 : Dtype::bfloat16;
}

}  // namespace recap
