// Asks for memory some time before it is updated. A processor's own prefetcher does not keep up
// with a loop over several streams, stops at the end of a page, and knows nothing of the next
// tensor.
#pragma once

#include <cstddef>

#include "../numerics/arithmetic.h"
#include "../plan/plan.h"
#include "../plan/step.h"

namespace recap::cpu {

// So much of every array is updated between two requests: a block.
constexpr int64_t kBlockBytes = 256;

// Goes through a range of tiles block by block, a fixed number of blocks before the one that is
// updated, from one tensor to the next. Tiles without a gradient are left out, as in the update,
// and those of whole rows, which ask for theirs themselves.
class Prefetch {
 public:
  Prefetch(const Plan& plan, const Step& step, size_t begin, size_t end);

  // Asks for nothing.
  static Prefetch none();

  // To be called once for each block that is updated, a tile's last one included.
  RECAP_INLINE void next_block() {
    if (left_ <= 0 && !next_tile()) return;
    const int64_t bytes = left_ < kBlockBytes ? left_ : kBlockBytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(grad_ + line);
    for (int k = 0; k < written_count_; ++k) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(written_[k] + line, 1);
      written_[k] += kBlockBytes;
    }
    grad_ += kBlockBytes;
    left_ -= kBlockBytes;
  }

 private:
  bool next_tile();

  const Plan& plan_;
  const Step& step_;
  size_t tile_, end_;
  int64_t left_ = 0;  // bytes of each array of the tile
  const char* grad_ = nullptr;
  const char* written_[kMaxStates + 1];  // parameter and states
  int written_count_ = 0;
};

}  // namespace recap::cpu
