// What a thread does with denormal numbers, as torch.set_flush_denormal sets it for the thread that
// calls it alone: a step has all its threads do as the one that takes the step.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace recap::cpu {

#if defined(__SSE__)

using FloatMode = unsigned int;
constexpr FloatMode kFlushBits = 0x8040;  // flush to zero, denormals are zero
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }

#elif defined(__aarch64__)

using FloatMode = uint64_t;
constexpr FloatMode kFlushBits = 1 << 24;
inline FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }

#else

using FloatMode = unsigned int;
constexpr FloatMode kFlushBits = 0;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}

#endif

// Has this thread flush as `mode` says, for as long as it lives.
class FlushingAs {
 public:
  explicit FlushingAs(FloatMode mode)
      : own_(float_mode()), differs_(((own_ ^ mode) & kFlushBits) != 0) {
    if (differs_) set_float_mode((own_ & ~kFlushBits) | (mode & kFlushBits));
  }
  ~FlushingAs() {
    if (differs_) set_float_mode((float_mode() & ~kFlushBits) | (own_ & kFlushBits));
  }
  FlushingAs(const FlushingAs&) = delete;

 private:
  const FloatMode own_;
  const bool differs_;
};

}  // namespace recap::cpu
