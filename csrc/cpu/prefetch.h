// Asks for memory some time before it is updated. A processor's own prefetcher knows nothing of the
// next tensor, and has no time to find out what a short one is. Which cache to ask, and whether to
// ask at all in the middle of a long one, is a matter of the machine (ways.h).
#pragma once

#include <cstddef>

#include "../numerics/arithmetic.h"
#include "../plan/plan.h"
#include "../plan/step.h"

namespace recap::cpu {

// So much of every array is updated between two requests: a block.
constexpr int64_t kBlockBytes = 256;

// Memory is asked for so many blocks before it is updated, from one tensor to the next.
constexpr int64_t kLead = 8;

// A tensor of so many bytes is long: requests go on to the next one after its first kLead blocks.
constexpr int64_t kLongBytes = 128 * 1024;

// The first condition spares small tensors the second.
RECAP_INLINE bool is_long(const Slot& slot) {
  return slot.size >= kLongBytes / 8 && slot.size * dtype_size(slot.dtype) >= kLongBytes;
}

class Prefetch {
 public:
  // For a range of tiles, into the first or second level of the caches. Tiles without a gradient
  // are left out, as in the update, and those of whole rows, which ask for theirs themselves.
  Prefetch(const Plan& plan, const Step& step, size_t begin, size_t end, int level);

  // Asks for nothing.
  static Prefetch none();

  // How many of the `size` elements from `begin` on come before the last kLead blocks of their
  // slot.
  static int64_t before_last_blocks(const Slot& slot, int64_t begin, int64_t size) {
    const int64_t block = kBlockBytes / dtype_size(slot.dtype);
    const int64_t end = ((slot.size + block - 1) / block - kLead) * block - begin;
    return end < 0 ? 0 : end < size ? end : size;
  }

  // To be called once for each block that is updated; of a long tensor, for the last kLead.
  RECAP_INLINE void next_block() {
    if (left_ <= 0 && !next_tile()) return;
    const int64_t bytes = left_ < kBlockBytes ? left_ : kBlockBytes;
    if (level_ == 2) {
      ask<2>(bytes);
    } else {
      ask<3>(bytes);
    }
    grad_ += kBlockBytes;
    left_ -= kBlockBytes;
  }

 private:
  // For the next block of each array; the compiler has 3 for the first level, and 2 for the second.
  template <int kLocality>
  RECAP_INLINE void ask(int64_t bytes) {
#pragma GCC unroll 1
    for (int64_t line = 0; line < bytes; line += 64) {
      __builtin_prefetch(grad_ + line, 0, kLocality);
    }
    for (int k = 0; k < written_count_; ++k) {
#pragma GCC unroll 1
      for (int64_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(written_[k] + line, 1, kLocality);
      }
      written_[k] += kBlockBytes;
    }
  }

  bool next_tile();

  const Plan& plan_;
  const Step& step_;
  size_t tile_, end_;
  int level_;
  int64_t left_ = 0;  // bytes of each array of the tile
  const char* grad_ = nullptr;
  const char* written_[kMaxStates + 1];  // parameter and states
  int written_count_ = 0;
};

}  // namespace recap::cpu
