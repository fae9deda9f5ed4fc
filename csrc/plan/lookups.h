// The lookups behind a sparse gradient, sorted by row: which rows it touches, and which of its
// values belong to each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../numerics/arithmetic.h"

namespace recap {

class Lookups {
 public:
  // Takes the row of each lookup. Returns false if one is not in [0, rows). Throws
  // std::length_error if there are more rows and lookups than two numbers in 64 bits can tell.
  bool take(const int64_t* rows_looked_up, int64_t count, int64_t rows);

  // Sorts what was taken by row, and the lookups of a row by their place.
  void sort();

  // After `sort`: how many rows there are, and of one of them its number, and where its lookups
  // begin; the end is where those of the next one do.
  int64_t rows() const { return static_cast<int64_t>(first_.size()) - 1; }
  RECAP_INLINE int64_t row(int64_t i) const {
    return static_cast<int64_t>(keys_[first_[i]] >> place_bits_);
  }
  RECAP_INLINE int64_t first(int64_t i) const { return static_cast<int64_t>(first_[i]); }

  // The place of a lookup among those taken.
  RECAP_INLINE int64_t place(int64_t lookup) const {
    return static_cast<int64_t>(keys_[lookup] & ((uint64_t{1} << place_bits_) - 1));
  }

 private:
  // All three are kept from step to step, so that a step allocates nothing.
  std::vector<uint64_t> keys_;  // row, and below it the place
  std::vector<uint64_t> other_keys_;
  std::vector<size_t> first_;
  int place_bits_ = 0, row_bits_ = 0;
  bool is_sorted_ = false;  // as they came, each row once
};

}  // namespace recap
