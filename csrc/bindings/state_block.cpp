#include "state_block.h"

#include <c10/core/UndefinedTensorImpl.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>

namespace recap {
namespace {

constexpr size_t kCacheLine = 64;
// Of the memory for headers: that of a few parameters, then that of many.
constexpr size_t kFirstHeaders = 4 * 1024;
constexpr size_t kMoreHeaders = 64 * 1024;

// A tensor or storage header whose memory is a block's: those of one parameter's states lie side by
// side, each from the start of a cache line. Behind it is what keeps the block.
template <typename Base>
struct Header final : Base {
  using Base::Base;
  using Owner = std::shared_ptr<StateBlock>;

  static void* operator new(size_t, void* memory, Owner block) {
    new (owner_of(memory)) Owner(std::move(block));
    return memory;
  }
  static void operator delete(void* memory) {
    const Owner last = std::move(*owner_of(memory));
    owner_of(memory)->~Owner();
  }
  static void operator delete(void* memory, void*, Owner) { operator delete(memory); }

  static constexpr size_t size() {
    return (sizeof(Header) + sizeof(Owner) + kCacheLine - 1) / kCacheLine * kCacheLine;
  }

 private:
  static Owner* owner_of(void* memory) {
    return reinterpret_cast<Owner*>(static_cast<char*>(memory) + sizeof(Header));
  }
};
using StateTensor = Header<c10::TensorImpl>;
using StateStorage = Header<c10::StorageImpl>;

}  // namespace

void* StateBlock::header(size_t size) {
  if (header_space_ < size) {
    const size_t space = headers_.empty() ? kFirstHeaders : kMoreHeaders;
    headers_.emplace_back(std::aligned_alloc(kCacheLine, space));
    next_header_ = static_cast<char*>(headers_.back().get());
    if (!next_header_) throw std::bad_alloc();
    header_space_ = space;
  }
  header_space_ -= size;
  return std::exchange(next_header_, next_header_ + size);
}

bool StateBlock::made(const c10::TensorImpl& tensor) {
  return typeid(tensor) == typeid(StateTensor);
}

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
  const auto self = shared_from_this();
  c10::DataPtr data(static_cast<char*>(memory_.get()) + offset,
                    new std::shared_ptr<StateBlock>(self), release, at::kCPU);
  auto* const storage = new (header(StateStorage::size()), self)
      StateStorage(c10::StorageImpl::use_byte_size_t(), c10::SymInt(bytes), std::move(data),
                   /*allocator=*/nullptr, /*resizable=*/false);
  c10::Storage owned(c10::intrusive_ptr<c10::StorageImpl>::unsafe_steal_from_new(storage));
  auto* const made = new (header(StateTensor::size()), self)
      StateTensor(std::move(owned), c10::DispatchKeySet(c10::DispatchKey::CPU),
                  c10::scalarTypeToTypeMeta(dtype));
  at::Tensor tensor(
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::unsafe_steal_from_new(made));
  made->set_sizes_and_strides(shape, strides);
  return tensor;
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
