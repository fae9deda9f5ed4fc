#include "lookups.h"

#include <algorithm>
#include <stdexcept>

namespace recap {
namespace {

constexpr int kDigitBits = 11;
constexpr size_t kDigits = size_t{1} << kDigitBits;
constexpr size_t kFew = 256;  // up to so many keys, counting digits takes longer than comparing

int bits_of(uint64_t number) {
  int bits = 0;
  for (; number; number >>= 1) ++bits;
  return bits;
}

// Stable, by the digit from `shift` on. Returns false if all have the same, and nothing was moved.
bool move_by_digit(const std::vector<uint64_t>& from, std::vector<uint64_t>& to, int shift) {
  size_t begin_of[kDigits] = {};
  const auto digit = [shift](uint64_t key) { return (key >> shift) & (kDigits - 1); };
  for (const uint64_t key : from) ++begin_of[digit(key)];
  if (begin_of[digit(from[0])] == from.size()) return false;
  size_t begin = 0;
  for (size_t& of_digit : begin_of) {
    const size_t count = of_digit;
    of_digit = begin;
    begin += count;
  }
  for (const uint64_t key : from) to[begin_of[digit(key)]++] = key;
  return true;
}

}  // namespace

bool Lookups::take(const int64_t* rows_looked_up, int64_t count, int64_t rows) {
  place_bits_ = std::max(bits_of(static_cast<uint64_t>(std::max(count, int64_t{1}) - 1)), 1);
  row_bits_ = bits_of(static_cast<uint64_t>(std::max(rows, int64_t{1}) - 1));
  if (place_bits_ + row_bits_ > 64) throw std::length_error("too many rows and lookups");
  keys_.resize(count);
  is_sorted_ = true;
  bool is_inside = true;
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows_looked_up[i];
    is_inside &= static_cast<uint64_t>(row) < static_cast<uint64_t>(rows);
    is_sorted_ &= row > last;
    last = row;
    keys_[i] = static_cast<uint64_t>(row) << place_bits_ | static_cast<uint64_t>(i);
  }
  return is_inside;
}

void Lookups::sort() {
  if (!is_sorted_) {
    if (keys_.size() <= kFew) {
      std::sort(keys_.begin(), keys_.end());
    } else {
      other_keys_.resize(keys_.size());
      for (int bit = 0; bit < row_bits_; bit += kDigitBits) {
        if (move_by_digit(keys_, other_keys_, place_bits_ + bit)) keys_.swap(other_keys_);
      }
    }
    is_sorted_ = true;
  }
  first_.clear();
  for (size_t i = 0; i < keys_.size(); ++i) {
    if (i == 0 || (keys_[i] ^ keys_[i - 1]) >> place_bits_) first_.push_back(i);
  }
  first_.push_back(keys_.size());
}

}  // namespace recap
