// Whether two problems hold the same numbers.
#pragma once

#include <cstring>

#include "check.h"
#include "problem.h"

template <typename T>
bool same_number(const unsigned char* a, const unsigned char* b) {
  if (memcmp(a, b, sizeof(T)) == 0) return true;
  T x, y;
  memcpy(&x, a, sizeof x);
  memcpy(&y, b, sizeof y);
  const auto wide_x = recap::load(x), wide_y = recap::load(y);
  return wide_x != wide_x && wide_y != wide_y;
}

// The same bits, or NaN both: which of several NaN comes out is left to the processor.
inline bool same_number(Dtype dtype, const unsigned char* a, const unsigned char* b) {
  switch (dtype) {
    case Dtype::float32: return same_number<float>(a, b);
    case Dtype::float64: return same_number<double>(a, b);
    case Dtype::bfloat16: return same_number<recap::BFloat16>(a, b);
    case Dtype::float16: return same_number<recap::Float16>(a, b);
  }
  return false;
}

template <typename... Parts>
void check_same(Problem& found, Problem& expected, const Parts&... parts) {
  CHECK(found.guards_intact() && expected.guards_intact(), "a guard zone was written. ", parts...);
  for (size_t slot = 0; slot < found.plan.slots.size(); ++slot) {
    const Dtype dtype = found.shape(slot).dtype;
    const size_t element = recap::dtype_size(dtype);
    for (int index = 0; index < kArrays; ++index) {
      Guarded* array = found.array(slot, index);
      if (!array) continue;
      for (size_t i = 0; i < array->size(); i += element) {
        CHECK(same_number(dtype, array->data() + i, expected.array(slot, index)->data() + i),
              "slot ", slot, " (update ", static_cast<int>(found.shape(slot).update), ", dtype ",
              static_cast<int>(dtype), ", size ", found.shape(slot).size, ") array ", index,
              " element ", i / element, ". ", parts...);
      }
    }
  }
}
