// A cuda_runtime.h that runs on the CPU: found instead of the toolkit's, it lets the very sources
// of the CUDA engine be compiled as ordinary C++ and executed.
//
// The threads of a warp take turns, in their order: one runs until it meets the others in a
// shuffle, or is over. Warps run one after the other. A barrier of a block is therefore nothing at
// all, which is right for a kernel in which only the first thread writes what the block shares, and
// only before the barrier; that is all the engine's kernels do. Blocks run one after the other too,
// in an order that `shuffle_blocks` makes random.
//
// Streams are queues that stay idle until something waits for them, and then run in an order that
// the caller of CUDA may not rely on. So work that starts without waiting for what it needs reads
// what is not there yet, or memory that is already freed. Device memory is poisoned before its
// first use and after its last. With `immediate`, a stream does at once what it is given instead,
// and the null stream, of whatever device is current, is one too: for tests that only want results.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
// One copy of the parameter for all threads.
#define __grid_constant__ &

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorInvalidDevice
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
constexpr unsigned cudaEventDisableTiming = 2;

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

constexpr int kDevices = 2;
constexpr unsigned kWarp = 32;
constexpr size_t kMaxArguments = 32764;

struct Stream {
  int device;
  std::deque<std::function<bool()>> work;  // false: must wait for another stream
  bool capturing = false;                  // work goes to `captured`, to be replayed
  std::vector<std::function<bool()>> captured;
};

struct Event {
  uint64_t recorded = 0, reached = 0;
};

struct Launch {
  unsigned blocks;
  size_t argument_bytes;
  int device;
};

// Memory whose stores are counted, byte by byte.
struct Watched {
  size_t size;
  std::vector<uint8_t> stores;
};

struct Machine {
  std::vector<std::unique_ptr<Stream>> streams;
  int device = 0;
  std::vector<Launch> launches;
  std::map<const unsigned char*, Watched> watched;
  size_t stores_of[17] = {};  // by width in bytes
  size_t copies = 0;
  std::map<const void*, size_t> allocated;  // addresses and sizes
  int calls_until_failure = -1;  // of the runtime calls that can fail; negative: none fails
  bool sticky = false;           // an error that nobody has taken yet
  bool immediate = false;
  bool shuffle_blocks = false;
  std::mt19937 random;
  // Called when a block has taken a ticket by atomicAdd that is not its grid's last, and when any
  // block is over: for what another block would do meanwhile.
  std::function<void()> ticket_taken, block_over;

  Stream* stream(int device);  // a new one
  bool fails() { return calls_until_failure >= 0 && calls_until_failure-- == 0; }

  // Appends to `stream` the work that it captured.
  void replay(Stream* stream);

  // Runs all work: of the youngest stream first, each as far as it can.
  void synchronize();
};

Machine& machine();
inline thread_local dim3 thread{0}, block{0}, grid{0};

// Calls `run` for each thread of a warp, `thread` being it, from `first` on.
void run_warp(unsigned first, const std::function<void()>& run);

// What the thread of the warp has given here whose number differs in the bits of `lanes`; all of
// the warp's must be here.
unsigned exchange(unsigned value, int lanes);

inline void require_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) std::abort();
}

template <typename Word>
void count_store(const Word* address) {
  Machine& m = machine();
  ++m.stores_of[sizeof(Word)];
  if (m.watched.empty()) return;
  const auto* byte = reinterpret_cast<const unsigned char*>(address);
  auto after = m.watched.upper_bound(byte);
  if (after == m.watched.begin()) return;
  Watched& watched = std::prev(after)->second;
  const size_t offset = byte - std::prev(after)->first;
  for (size_t i = offset; i < offset + sizeof(Word) && i < watched.size; ++i) ++watched.stores[i];
}

}  // namespace emulation

#define threadIdx (emulation::thread)
#define blockIdx (emulation::block)

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lanes) {
  return emulation::exchange(value, lanes);
}
inline void __syncthreads() {}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  const auto& taken = emulation::machine().ticket_taken;
  if (taken && *address != emulation::grid.x) taken();
  return old;
}

using cudaStream_t = emulation::Stream*;
using cudaEvent_t = std::shared_ptr<emulation::Event>*;
using cudaHostFn_t = void (*)(void*);

// A GPU stops at an access that is not aligned to its width.
template <typename Word>
Word __ldcg(const Word* address) {
  emulation::require_alignment(address, sizeof(Word));
  return *address;
}
template <typename Word>
Word __ldca(const Word* address) {
  return __ldcg(address);
}
template <typename Word>
void __stcg(Word* address, Word value) {
  emulation::require_alignment(address, sizeof(Word));
  emulation::count_store(address);
  *address = value;
}

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}

namespace emulation {

// The result of a call that enqueues `work`.
inline cudaError_t enqueue(Stream* stream, std::function<bool()> work,
                           cudaError_t failure = cudaErrorInvalidValue) {
  Machine& m = machine();
  const bool known = stream ? stream->device == m.device : m.immediate;
  if (!known || m.fails()) {
    m.sticky = true;
    return failure;
  }
  if (stream && stream->capturing) {
    stream->captured.push_back(std::move(work));
  } else if (!m.immediate) {
    stream->work.push_back(std::move(work));
  } else if (!work()) {
    std::abort();  // it waits for what has not been asked for
  }
  return cudaSuccess;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  const bool failed = emulation::machine().sticky;
  emulation::machine().sticky = false;
  return failed ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::machine().device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kDevices) return cudaErrorInvalidDevice;
  emulation::machine().device = device;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status =
      stream && stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  emulation::machine().synchronize();
  return cudaSuccess;
}

inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t stream) {
  const cudaError_t error =
      emulation::enqueue(stream, [] { return true; }, cudaErrorMemoryAllocation);
  if (error != cudaSuccess) return error;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xcd, bytes);
  emulation::machine().allocated[*memory] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  return emulation::enqueue(stream, [memory] {
    const auto found = emulation::machine().allocated.find(memory);
    if (found == emulation::machine().allocated.end()) std::abort();
    std::memset(memory, 0xdd, found->second);
    std::free(memory);
    emulation::machine().allocated.erase(found);
    return true;
  });
}
// Reads the host's memory as late as CUDA may.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  ++emulation::machine().copies;
  return emulation::enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return true;
  });
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return emulation::enqueue(stream, [=] {
    function(data);
    return true;
  });
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (emulation::machine().fails()) return cudaErrorInvalidValue;
  *event = new std::shared_ptr<emulation::Event>(new emulation::Event);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const auto state = *event;
  const uint64_t number = ++state->recorded;
  return emulation::enqueue(stream, [=] {
    state->reached = number;
    return true;
  });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  // CUDA refuses this: what was not captured cannot be waited for in a graph.
  if (stream && stream->capturing) return cudaErrorInvalidValue;
  const auto state = *event;
  const uint64_t number = state->recorded;
  return emulation::enqueue(stream, [=] { return state->reached >= number; });
}

namespace emulation {

// The numbers of the blocks, in the order in which they run.
inline std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (machine().shuffle_blocks) std::shuffle(order.begin(), order.end(), machine().random);
  return order;
}

}  // namespace emulation

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(const Arguments&), dim3 grid, dim3 threads,
                             void** arguments, size_t, cudaStream_t stream) {
  if (grid.x == 0 || sizeof(Arguments) > emulation::kMaxArguments) return cudaErrorInvalidValue;
  const auto copy = std::make_shared<Arguments>();
  std::memcpy(static_cast<void*>(copy.get()), arguments[0], sizeof(Arguments));
  const cudaError_t error = emulation::enqueue(stream, [=] {
    emulation::grid = grid;
    for (const unsigned block : emulation::block_order(grid.x)) {
      emulation::block.x = block;
      for (unsigned first = 0; first < threads.x; first += emulation::kWarp) {
        emulation::run_warp(first, [&] { kernel(*copy); });
      }
      if (emulation::machine().block_over) emulation::machine().block_over();
    }
    return true;
  });
  if (error == cudaSuccess) {
    emulation::machine().launches.push_back(
        {grid.x, sizeof(Arguments), emulation::machine().device});
  }
  return error;
}
