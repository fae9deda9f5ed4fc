#include "state_block.h"

#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace recap {

void StateBlock::Free::operator()(void* memory) const { std::free(memory); }

StateBlock::StateBlock(int64_t size)
    : memory_(size > 0 ? std::calloc(static_cast<size_t>(size), 1) : nullptr), size_(size) {
  if (!memory_) throw std::bad_alloc();
}

at::Tensor StateBlock::tensor(int64_t offset, const std::vector<int64_t>& shape,
                              const std::vector<int64_t>& strides, at::ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t length : shape) bytes *= length;
  if (offset < 0 || bytes > size_ - offset) {
    throw std::out_of_range(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                            " are not in a block of " + std::to_string(size_));
  }
  auto owner = std::make_unique<std::shared_ptr<StateBlock>>(shared_from_this());
  return at::for_blob(static_cast<char*>(memory_.get()) + offset, shape)
      .strides(strides)
      .context(owner.release(), release)
      .options(at::TensorOptions(at::kCPU).dtype(dtype))
      .make_tensor();
}

std::shared_ptr<StateBlock> StateBlock::of(c10::StorageImpl& storage) {
  const auto* owner =
      storage._mutable_data_ptr_no_checks().cast_context<std::shared_ptr<StateBlock>>(release);
  return owner ? *owner : nullptr;
}

void StateBlock::release(void* context) {
  const std::unique_ptr<std::shared_ptr<StateBlock>> owner(
      static_cast<std::shared_ptr<StateBlock>*>(context));
  (*owner)->released_.fetch_add(1, std::memory_order_release);
}

}  // namespace recap
