// As much of CUDA as the kernels of select_threshold and compact_active use, on the host. A thread block is
// one thread of the system, its CUDA threads are fibers that run in random order from barrier to barrier: a
// missing barrier gives wrong results. Several blocks run at a time, so that they really wait for one
// another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

struct dim3 {
  unsigned x;
  dim3(unsigned count = 1) : x(count) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace on_host {

inline unsigned processors = 2, seed = 0;  // what cudaDeviceGetAttribute says, and of the order of fibers
constexpr unsigned kLanes = 32;
constexpr std::size_t kStackBytes = 64 << 10;

struct Warp {
  unsigned long long slots[2][kLanes];  // a collective's values; the next one uses the other half
  unsigned arrived[2];
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;  // left and entered again by jumps: swapcontext asks the system for the signal mask
  bool started = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<unsigned> barriers, collectives;  // passed so far, by fiber
  std::vector<bool> done;
  std::vector<Warp> warps;
  std::vector<unsigned> waiting;  // fibers at barrier number i
  jmp_buf scheduler;
  std::function<void()> kernel;
  unsigned current, size;
};

inline thread_local Block* block;

inline void yield() {
  if (!_setjmp(block->fibers[block->current].here)) _longjmp(block->scheduler, 1);
}

// Until the fiber yields.
inline void run_on(Fiber& fiber) {
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_fiber() {
  block->kernel();
  block->done[block->current] = true;
  yield();
}

inline void run_block(unsigned index, unsigned blocks, unsigned threads,
                      const std::function<void()>& kernel) {
  Block own;
  block = &own;
  own.kernel = kernel;
  own.size = threads;
  own.fibers.resize(threads);
  own.barriers.resize(threads);
  own.collectives.resize(threads);
  own.done.resize(threads);
  own.warps.resize((threads + kLanes - 1) / kLanes);
  blockIdx = dim3(index);
  gridDim = dim3(blocks);
  for (unsigned t = 0; t < threads; ++t) {
    own.stacks.emplace_back(new char[kStackBytes]);
    ucontext_t& start = own.fibers[t].start;
    getcontext(&start);
    start.uc_stack.ss_sp = own.stacks[t].get();
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, run_fiber, 0);
  }
  std::mt19937 order(seed * 7919 + index);
  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  for (bool running = true; running;) {
    running = false;
    std::shuffle(turns.begin(), turns.end(), order);
    for (const unsigned t : turns) {
      if (own.done[t]) continue;
      running = true;
      own.current = t;
      threadIdx = dim3(t);
      run_on(own.fibers[t]);
    }
    std::this_thread::yield();
  }
}

// Every lane gives a value and gets those of all; lanes of a last, partial warp are not supported.
inline const unsigned long long* exchange(unsigned long long value) {
  const unsigned thread = block->current, turn = block->collectives[thread]++;
  Warp& warp = block->warps[thread / kLanes];
  warp.slots[turn % 2][thread % kLanes] = value;
  warp.arrived[turn % 2] += 1;
  const unsigned expected = (turn / 2 + 1) * kLanes;
  while (warp.arrived[turn % 2] < expected) yield();
  return warp.slots[turn % 2];
}

inline unsigned lane() {
  return block->current % kLanes;
}

}  // namespace on_host

inline void __syncthreads() {
  on_host::Block& block = *on_host::block;
  const unsigned number = block.barriers[block.current]++;
  if (block.waiting.size() <= number) block.waiting.resize(number + 1);
  block.waiting[number] += 1;
  while (block.waiting[number] < block.size) on_host::yield();
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return static_cast<T>(on_host::exchange(value)[source]);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(on_host::lane());
  const unsigned long long* values = on_host::exchange(value);
  return lane >= distance ? static_cast<T>(values[lane - distance]) : value;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return static_cast<T>(on_host::exchange(value)[on_host::lane() ^ static_cast<unsigned>(distance)]);
}

inline unsigned __ballot_sync(unsigned, bool holds) {
  const unsigned long long* values = on_host::exchange(holds);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < on_host::kLanes; ++lane) bits |= (values[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}

inline bool __any_sync(unsigned mask, bool holds) {
  return __ballot_sync(mask, holds) != 0;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(on_host::processors);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

// A few blocks at a time, started in order as on a GPU.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  constexpr unsigned kAtATime = 3;
  const unsigned blocks = config->gridDim.x;
  if (blocks == 0) std::abort();  // an invalid launch
  std::atomic<unsigned> next{0};
  std::vector<std::thread> workers;
  for (unsigned w = 0; w < kAtATime && w < blocks; ++w) {
    workers.emplace_back([&] {
      for (unsigned b = next++; b < blocks; b = next++) {
        on_host::run_block(b, blocks, config->blockDim.x, [&] { kernel(arguments...); });
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  return cudaSuccess;
}
