// Memory between guard zones that nobody may touch. With AddressSanitizer reading them fails at
// once; writing them always shows in `intact`.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

class Guarded {
 public:
  // `size` bytes that start `shift` bytes after a cache line does.
  Guarded(size_t size, size_t shift)
      : size_(size), memory_(kLine + shift + 2 * kZone + size, kPoison) {
    const size_t misalignment = reinterpret_cast<uintptr_t>(memory_.data()) % kLine;
    front_ = (kLine - misalignment) % kLine + kZone + shift;
    std::fill_n(data(), size_, 0);
    ASAN_POISON_MEMORY_REGION(memory_.data(), front_);
    ASAN_POISON_MEMORY_REGION(data() + size_, memory_.size() - front_ - size_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { open(); }

  unsigned char* data() { return memory_.data() + front_; }
  size_t size() const { return size_; }

  bool intact() {
    open();
    const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
    return std::all_of(memory_.data(), data(), is_poison) &&
           std::all_of(data() + size_, memory_.data() + memory_.size(), is_poison);
  }

 private:
  static constexpr size_t kLine = 64, kZone = 128;
  static constexpr unsigned char kPoison = 0xa5;

  void open() { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size()); }

  size_t size_;
  size_t front_;
  std::vector<unsigned char> memory_;
};
