// Memory in which small states of many parameters lie one after the other, each in a storage of its
// own. A step asks the block alone whether they all are where they were.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <vector>

namespace recap {

class StateBlock : public std::enable_shared_from_this<StateBlock> {
 public:
  // Zeroed memory of `size` bytes, on the CPU.
  explicit StateBlock(int64_t size);

  int64_t size() const { return size_; }
  const void* address() const { return memory_.get(); }

  // A dense tensor at `offset` bytes, whose storage cannot be resized. The block lives as long as
  // the storage; that two do not overlap is the caller's care. Raises an error if it does not fit.
  at::Tensor tensor(int64_t offset, const std::vector<int64_t>& shape,
                    const std::vector<int64_t>& strides, at::ScalarType dtype);

  // How many storages have let go of their memory here, as one does that is shared with another
  // process, or freed.
  uint64_t released() const { return released_.load(std::memory_order_acquire); }

  // The block that a storage has its memory of; null if it is from elsewhere.
  static std::shared_ptr<StateBlock> of(c10::StorageImpl& storage);

  // Whether a tensor is one that `tensor` made. Its own memory then stays readable for as long as
  // the block lives, also when the tensor itself is gone.
  static bool made(const c10::TensorImpl& tensor);

 private:
  static void release(void* context);
  void* header(size_t size);  // memory for one, of a multiple of a cache line

  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_;
  std::vector<std::unique_ptr<void, Free>> headers_;
  char* next_header_ = nullptr;  // in the last of them
  size_t header_space_ = 0;      // left there
  std::atomic<uint64_t> released_{0};
};

}  // namespace recap
