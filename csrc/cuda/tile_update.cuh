// How a thread block updates one tile, whatever its algorithm and dtype: what the kernels share.
//
// The updates and their sources are in ../algorithms. Bytes that must move per element: Adam 7
// values (read param, grad and two states; write param and states), amsgrad 9, Adagrad and momentum
// SGD 5, SGD 3, of 2, 4 or 8 bytes. There are some 15 operations to them, so memory bounds the
// kernel, and everything below is about asking for it early and in the fewest accesses:
//
//  * A thread asks for 16 bytes of each array before it uses any: 2 to 5 independent loads. 768
//    resident threads then have 24 (SGD) to 60 KB in flight per multiprocessor. More per thread
//    would take the registers that keep those threads resident.
//  * Where a tile ends, or is not aligned to 16 bytes, as a gradient in a communication bucket may
//    be, neighbouring threads take neighbouring elements, as many per thread as a 16-byte access
//    has. Both ways share the code of the update, of which there is one for each of 4 dtypes.
//  * Accesses bypass the first-level cache (.cg), since nothing is touched twice; in the second
//    level they are ordinary, so that a small model still finds its parameters there.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../numerics/storage.h"
#include "launch_arguments.h"

#define RECAP_DEVICE __device__ __forceinline__

namespace recap::cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;  // allows 80 registers; at 4 blocks and 64, they spill

// --- access ----------------------------------------------------------------------------

// What one thread holds of a chunk: 16 bytes of each array. Elements are cut out of whole registers
// when they are used; an array of 16-bit elements would take a register for each.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);
template <typename T>
constexpr int kChunk = kThreads * kWidth<T>;

template <typename T>
struct Share {
  static constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t word[4];

  RECAP_DEVICE T get(int i) const {
    T value;
    memcpy(&value, &word[i * kWords], sizeof value);
    return value;
  }
  RECAP_DEVICE void set(int i, T value) { memcpy(&word[i * kWords], &value, sizeof value); }
};

template <typename T>
struct HalfShare {
  uint32_t word[4];

  RECAP_DEVICE T get(int i) const { return {static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))}; }
  RECAP_DEVICE void set(int i, T value) {
    const uint32_t old = word[i / 2], bits = value.bits;
    word[i / 2] = i % 2 ? (old & 0xffffu) | bits << 16 : (old & 0xffff0000u) | bits;
  }
};
template <>
struct Share<BFloat16> : HalfShare<BFloat16> {};
template <>
struct Share<Float16> : HalfShare<Float16> {};

// Brings the second word to the front, and the first to the end.
template <typename T>
RECAP_DEVICE void rotate(Share<T>& share) {
  const uint32_t first = share.word[0];
  share.word[0] = share.word[1];
  share.word[1] = share.word[2];
  share.word[2] = share.word[3];
  share.word[3] = first;
}

// The word that moves kBytes bytes with one instruction.
template <size_t kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = unsigned long long;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename Value>
RECAP_DEVICE Value load_from(const void* address) {
  using W = typename Word<sizeof(Value)>::type;
  const W word = __ldcg(static_cast<const W*>(address));
  Value value;
  memcpy(&value, &word, sizeof value);
  return value;
}

template <typename Value>
RECAP_DEVICE void store_to(void* address, const Value& value) {
  using W = typename Word<sizeof(Value)>::type;
  W word;
  memcpy(&word, &value, sizeof word);
  __stcg(static_cast<W*>(address), word);
}

// How the threads of a block share out a chunk that is whole and aligned.
struct Whole {
  template <typename T>
  RECAP_DEVICE Share<T> load(const T* chunk) const {
    return load_from<Share<T>>(chunk + threadIdx.x * kWidth<T>);
  }
  template <typename T>
  RECAP_DEVICE void store(T* chunk, const Share<T>& share) const {
    store_to(chunk + threadIdx.x * kWidth<T>, share);
  }
};

// Any other chunk.
struct Part {
  int size;

  template <typename T>
  RECAP_DEVICE Share<T> load(const T* chunk) const {
    Share<T> share = {};
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at < size) share.set(i, load_from<T>(chunk + at));
    }
    return share;
  }
  template <typename T>
  RECAP_DEVICE void store(T* chunk, const Share<T>& share) const {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at < size) store_to(chunk + at, share.get(i));
    }
  }
};

// --- update ----------------------------------------------------------------------------

template <typename Algorithm, typename T>
struct Arrays {
  T* param;
  const T* grad;
  T* state[kMaxStates];

  RECAP_DEVICE bool aligned() const {
    uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) addresses |= reinterpret_cast<uintptr_t>(state[k]);
    return addresses % 16 == 0;
  }
};

template <typename Algorithm, typename T>
struct Chunk {
  using C = typename Compute<T>::type;
  using Values = typename Algorithm::template Values<C>;

  Share<T> param, grad, state[kMaxStates];

  template <typename Access>
  RECAP_DEVICE void load(const Access& access, const Arrays<Algorithm, T>& arrays, int begin) {
    param = access.load(static_cast<const T*>(arrays.param) + begin);
    grad = access.load(arrays.grad + begin);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) {
      state[k] = access.load(static_cast<const T*>(arrays.state[k]) + begin);
    }
  }

  template <typename Access>
  RECAP_DEVICE void store(const Access& access, const Arrays<Algorithm, T>& arrays,
                          int begin) const {
    access.store(arrays.param + begin, param);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) access.store(arrays.state[k] + begin, state[k]);
  }

  // 16-bit elements in a loop, one word at a time: all eight at once would need more registers than
  // there are, and four times the time to compile.
  RECAP_DEVICE void update(const Values& h) {
    constexpr int kElements = sizeof(T) == 2 ? 2 : kWidth<T>;
#pragma unroll 1
    for (int done = 0; done < kWidth<T>; done += kElements) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) update_element(h, i);
      if constexpr (kElements < kWidth<T>) {
        rotate(param);
        rotate(grad);
#pragma unroll
        for (int k = 0; k < Algorithm::kStates; ++k) rotate(state[k]);
      }
    }
  }

  RECAP_DEVICE void update_element(const Values& h, int i) {
    C p = recap::load(param.get(i));
    C s[kMaxStates] = {};
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) s[k] = recap::load(state[k].get(i));
    Algorithm::update(h, recap::load(grad.get(i)), p, s);
    T stored;
    recap::store(p, stored);
    param.set(i, stored);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) {
      recap::store(s[k], stored);
      state[k].set(i, stored);
    }
  }
};

template <typename Algorithm, typename T>
RECAP_DEVICE void update_tile(const UpdateValues<typename Compute<T>::type>& values,
                              const TileEntry& tile, const void* grad) {
  // In double, or beside three states in 16 bits, the values would not fit the registers, and are
  // read anew.
  constexpr bool kReadAnew = sizeof(T) == 8 || (sizeof(T) == 2 && Algorithm::kStates == 3);
  using Values = typename Algorithm::template Values<typename Compute<T>::type>;
  const std::conditional_t<kReadAnew, const Values&, const Values> h =
      values.template of<Algorithm>();
  Arrays<Algorithm, T> arrays;
  arrays.param = static_cast<T*>(tile.param);
  arrays.grad = static_cast<const T*>(grad) + tile.begin;
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) arrays.state[k] = static_cast<T*>(tile.state[k]);
  const bool aligned = arrays.aligned();
  const int size = tile.size;
#pragma unroll 1
  for (int begin = 0; begin < size; begin += kChunk<T>) {
    Chunk<Algorithm, T> chunk;
    const Part part = {size - begin};
    const bool whole = aligned && part.size >= kChunk<T>;
    if (whole) {
      chunk.load(Whole(), arrays, begin);
    } else {
      chunk.load(part, arrays, begin);
    }
    chunk.update(h);
    if (whole) {
      chunk.store(Whole(), arrays, begin);
    } else {
      chunk.store(part, arrays, begin);
    }
  }
}

template <typename T>
RECAP_DEVICE void update_tile_by(Update update,
                                 const UpdateValues<typename Compute<T>::type>& values,
                                 const TileEntry& tile, const void* grad) {
#define RECAP_CASE(name, ...) \
  case Update::name:          \
    return update_tile<typename UpdateType<Update::name>::type, T>(values, tile, grad);
#define RECAP_NOT_HERE(name, ...) \
  case Update::name: return;  // refused for parameters on these devices
  switch (update) { RECAP_ELEMENT_UPDATES(RECAP_CASE) RECAP_ROW_UPDATES(RECAP_NOT_HERE) }
#undef RECAP_NOT_HERE
#undef RECAP_CASE
}

// That of the block, as if it were not known yet.
RECAP_DEVICE uint32_t block_number() {
  uint32_t block = blockIdx.x;
  asm volatile("" : "+r"(block));
  return block;
}

// Asks for a table entry, which lies in two sectors of memory. A block reads first one field of it
// and then, depending on that, others: without this, each would be a trip of its own.
RECAP_DEVICE void prefetch_entry(const TileEntry* tile) {
#if defined(__CUDA_ARCH__)
  const auto* const bytes = reinterpret_cast<const char*>(tile);
  asm volatile("prefetch.global.L1 [%0];" ::"l"(bytes));
  asm volatile("prefetch.global.L1 [%0];" ::"l"(bytes + sizeof(TileEntry) - 1));
#else
  (void)tile;
#endif
}

// Leaves zeros in the gradient of a tile that was updated, or whose step is skipped. Every thread
// writes what it alone has read, so that none waits for another.
RECAP_DEVICE void clear_grad(const TileEntry& tile, const void* grad) {
  constexpr int kChunkBytes = kThreads * sizeof(uint4);
  const int width = static_cast<int>(dtype_size(tile.dtype)), size = tile.size * width;
  auto* const bytes = static_cast<char*>(const_cast<void*>(grad)) + tile.begin * width;
  auto addresses = reinterpret_cast<uintptr_t>(tile.param) | reinterpret_cast<uintptr_t>(bytes);
  for (const void* state : tile.state) addresses |= reinterpret_cast<uintptr_t>(state);
  for (int begin = 0; begin < size; begin += kChunkBytes) {
    const int end = size - begin < kChunkBytes ? size : begin + kChunkBytes;
    if (addresses % sizeof(uint4) == 0 && end - begin == kChunkBytes) {
      store_to(bytes + begin + threadIdx.x * sizeof(uint4), uint4{});
      continue;
    }
    for (int at = begin + threadIdx.x * width; at < end; at += kThreads * width) {
      for (int half = 0; half < width; half += 2) store_to(bytes + at + half, uint16_t{});
    }
  }
}

// --- parameter -------------------------------------------------------------------------

// A table of the kernel's parameter, which is in the constant bank: `__grid_constant__` lets it be
// indexed without a copy per thread.
template <typename T, typename Header>
RECAP_DEVICE const T* table(const Header& header, uint32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(&header) + offset);
}

}  // namespace recap::cuda
