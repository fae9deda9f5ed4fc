#include "format_options.h"

#include <map>

#include "../numerics/rounding.h"

namespace recap {
namespace {

// FNV-1a (Fowler, Noll, Vo).
uint64_t hash_of(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : text) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  }
  return hash;
}

}  // namespace

std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: return std::nullopt;
  }
}

at::ScalarType scalar_type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return at::kFloat;
    case Dtype::float64: return at::kDouble;
    case Dtype::bfloat16: return at::kBFloat16;
    case Dtype::float16: return at::kHalf;
  }
  return at::kFloat;
}

std::optional<Format> FormatOptions::of(Dtype param, Dtype grad, bool has_states, bool takes_codes,
                                        const std::string& name) const {
  if (param == Dtype::float64) return std::nullopt;
  Format format;
  format.grad = grad;
  const std::optional<Dtype> wanted = eight_bits ? Dtype::float32 : state;
  format.state = has_states ? wanted.value_or(param) : param;
  format.has_codes = has_states && eight_bits && takes_codes;
  if (param != Dtype::float32) {
    const bool is_bfloat16 = param == Dtype::bfloat16;
    format.param = master_weights ? (is_bfloat16 ? ParamRounding::remainder : ParamRounding::master)
                   : stochastic_rounding ? ParamRounding::stochastic
                                         : ParamRounding::nearest;
  }
  const bool is_asked_for = (has_states && wanted) || format.param != ParamRounding::nearest;
  const bool are_exact = format.state == Dtype::float32 && !format.has_codes;
  format.draws_for_states = has_states && is_asked_for && !are_exact;
  const bool is_alike = format.state == param && grad == param && !format.draws_for_states;
  if (is_alike && format.param == ParamRounding::nearest) return std::nullopt;
  format.seed = mixed_bits(static_cast<uint64_t>(seed)) ^ hash_of(name);
  return format;
}

const char* rest_name(const Format& format) {
  switch (format.param) {
    case ParamRounding::remainder: return "param_remainder";
    case ParamRounding::master: return "master_param";
    case ParamRounding::nearest:
    case ParamRounding::stochastic: break;
  }
  return nullptr;
}

at::ScalarType rest_type(const Format& format) {
  return format.param == ParamRounding::remainder ? at::kShort : at::kFloat;
}

const char* scale_name(const char* state) {
  static std::map<std::string, std::string> names;
  auto& name = names[state];
  if (name.empty()) name = std::string(state) + "_scale";
  return name.c_str();
}

}  // namespace recap
