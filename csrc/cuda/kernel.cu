#include "kernel.h"

#include "../algorithms/storage.h"
#include "launch_arguments.h"

namespace recap::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;

// The word that moves kBytes bytes by one instruction.
template <size_t kBytes>
struct Word;
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

template <typename T>
__device__ __forceinline__ void load_word(T& to, const void* from) {
  using W = typename Word<sizeof(T)>::type;
  const W word = __ldcg(static_cast<const W*>(from));
  memcpy(&to, &word, sizeof word);
}

template <typename T>
__device__ __forceinline__ void store_word(const T& from, void* to) {
  using W = typename Word<sizeof(T)>::type;
  W word;
  memcpy(&word, &from, sizeof word);
  __stcg(static_cast<W*>(to), word);
}

// What one thread holds of a chunk: 16 bytes of each array.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);
template <typename T>
constexpr int kChunk = kThreads * kWidth<T>;
template <typename T>
struct alignas(16) Share {
  T at[kWidth<T>];
};

// Brings the second half of the elements to the front.
template <typename T>
__device__ __forceinline__ void swap_halves(Share<T>& share) {
  uint4 word;
  memcpy(&word, &share, sizeof word);
  word = {word.z, word.w, word.x, word.y};
  memcpy(&share, &word, sizeof word);
}

// A whole, aligned chunk: each thread takes neighbouring elements with one 16-byte access.
struct Whole {
  template <typename T>
  __device__ __forceinline__ void load(Share<T>& share, const T* chunk) const {
    load_word(share, chunk + threadIdx.x * kWidth<T>);
  }
  template <typename T>
  __device__ __forceinline__ void store(const Share<T>& share, T* chunk) const {
    store_word(share, chunk + threadIdx.x * kWidth<T>);
  }
};

// Any other chunk: neighbouring threads take neighbouring elements, one at a time.
struct Part {
  int size;

  template <typename T>
  __device__ __forceinline__ void load(Share<T>& share, const T* chunk) const {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      share.at[i] = T{};
      if (at < size) load_word(share.at[i], chunk + at);
    }
  }
  template <typename T>
  __device__ __forceinline__ void store(const Share<T>& share, T* chunk) const {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at < size) store_word(share.at[i], chunk + at);
    }
  }
};

template <typename Algorithm, typename T>
struct Chunk {
  using C = typename Compute<T>::type;
  using Values = typename Algorithm::template Values<C>;

  Share<T> param, grad, state[kMaxStates];

  template <typename Access>
  __device__ __forceinline__ void load(const Access& access, const TileEntry& tile, const T* g,
                                       int begin) {
    access.load(param, static_cast<const T*>(tile.param) + begin);
    access.load(grad, g + begin);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) {
      access.load(state[k], static_cast<const T*>(tile.state[k]) + begin);
    }
  }

  // 16-bit elements in two runs of four: unrolled all at once, the kernel would need more registers
  // than it has, and twice the time to compile.
  __device__ __forceinline__ void update(const Values& h) {
    constexpr int kRun = kWidth<T> < 4 ? kWidth<T> : 4;
#pragma unroll 1
    for (int done = 0; done < kWidth<T>; done += kRun) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) update_element(h, i);
      if constexpr (kRun < kWidth<T>) {
        swap_halves(param);
        swap_halves(grad);
#pragma unroll
        for (int k = 0; k < Algorithm::kStates; ++k) swap_halves(state[k]);
      }
    }
  }

  __device__ __forceinline__ void update_element(const Values& h, int i) {
    C p = recap::load(param.at[i]);
    C s[kMaxStates] = {};
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) s[k] = recap::load(state[k].at[i]);
    Algorithm::update(h, recap::load(grad.at[i]), p, s);
    recap::store(p, param.at[i]);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) recap::store(s[k], state[k].at[i]);
  }

  template <typename Access>
  __device__ __forceinline__ void store(const Access& access, const TileEntry& tile, int begin) {
    access.store(param, static_cast<T*>(tile.param) + begin);
#pragma unroll
    for (int k = 0; k < Algorithm::kStates; ++k) {
      access.store(state[k], static_cast<T*>(tile.state[k]) + begin);
    }
  }
};

template <typename Algorithm, typename T>
__device__ __forceinline__ void update_tile(const UpdateValues<typename Compute<T>::type>& values,
                                            const TileEntry& tile, const void* slot_grad) {
  const auto h = values.template of<Algorithm>();
  const T* const grad = static_cast<const T*>(slot_grad) + tile.begin;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(tile.param) | reinterpret_cast<uintptr_t>(grad);
#pragma unroll
  for (int k = 0; k < Algorithm::kStates; ++k) {
    addresses |= reinterpret_cast<uintptr_t>(tile.state[k]);
  }
  const bool aligned = addresses % 16 == 0;
#pragma unroll 1
  for (int begin = 0; begin < tile.size; begin += kChunk<T>) {
    Chunk<Algorithm, T> chunk;
    const Part part = {tile.size - begin};
    const bool whole = aligned && part.size >= kChunk<T>;
    if (whole) {
      chunk.load(Whole(), tile, grad, begin);
    } else {
      chunk.load(part, tile, grad, begin);
    }
    chunk.update(h);
    if (whole) {
      chunk.store(Whole(), tile, begin);
    } else {
      chunk.store(part, tile, begin);
    }
  }
}

template <typename T>
__device__ __forceinline__ const T* table(const ArgumentsHeader& header, uint32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(&header) + offset);
}

template <typename T>
__device__ __forceinline__ void update_tile_by(Update update,
                                               const UpdateValues<typename Compute<T>::type>& values,
                                               const TileEntry& tile, const void* grad) {
#define RECAP_CASE(name) \
  case Update::name: return update_tile<typename UpdateType<Update::name>::type, T>(values, tile, grad)
  switch (update) {
    RECAP_CASE(adam);
    RECAP_CASE(adam_l2);
    RECAP_CASE(adam_amsgrad);
    RECAP_CASE(adam_amsgrad_l2);
    RECAP_CASE(adagrad);
    RECAP_CASE(adagrad_l2);
    RECAP_CASE(sgd);
    RECAP_CASE(sgd_l2);
    RECAP_CASE(sgd_momentum);
    RECAP_CASE(sgd_momentum_l2);
    RECAP_CASE(sgd_nesterov);
    RECAP_CASE(sgd_nesterov_l2);
  }
#undef RECAP_CASE
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_tiles(const __grid_constant__ Arguments<kBytes> arguments) {
  const ArgumentsHeader& header = arguments.header;
  const TileEntry tile = header.tiles[blockIdx.x];
  const uint32_t slot = tile.slot - header.first_slot;
  const void* const grad = table<const void*>(header, header.grads)[slot];
  if (!grad) return;
  const uint8_t entry = table<uint8_t>(header, header.entry_of_slot)[slot];
  const Update update = table<Update>(header, header.updates)[entry];
  const auto* const float32 = table<UpdateValues<float>>(header, header.float32_values);
  const auto* const float64 = table<UpdateValues<double>>(header, header.float64_values);
  switch (tile.dtype) {
    case Dtype::float32: return update_tile_by<float>(update, float32[entry], tile, grad);
    case Dtype::float64: return update_tile_by<double>(update, float64[entry], tile, grad);
    case Dtype::bfloat16: return update_tile_by<BFloat16>(update, float32[entry], tile, grad);
    case Dtype::float16: return update_tile_by<Float16>(update, float32[entry], tile, grad);
  }
}

template <int kBytes>
cudaError_t launch(unsigned blocks, void* arguments, cudaStream_t stream) {
  return cudaLaunchKernel(update_tiles<kBytes>, dim3(blocks), dim3(kThreads), &arguments, 0, stream);
}

}  // namespace

cudaError_t launch_kernel(size_t bytes, unsigned blocks, void* arguments, cudaStream_t stream) {
  return bytes <= kSmallArguments ? launch<kSmallArguments>(blocks, arguments, stream)
                                  : launch<kLargeArguments>(blocks, arguments, stream);
}

}  // namespace recap::cuda
