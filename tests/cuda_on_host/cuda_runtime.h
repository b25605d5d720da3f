// Stands in for CUDA's header: kernels without shared memory and without exchanges between threads run on the
// CPU, one thread after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}

template <typename T>
void __stcs(T* pointer, T x) {
  *pointer = x;
}

template <typename T>
T atomicAdd(T* pointer, T x) {
  const T before = *pointer;
  *pointer += x;
  return before;
}

struct Index {
  unsigned x = 0;
};
inline Index blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}

// Where a source has kernel<<<blocks, threads, 0, stream>>>(arguments), the test puts
// launch_on_host(kernel, blocks, threads)(arguments).
template <typename Kernel>
auto launch_on_host(Kernel kernel, unsigned blocks, unsigned threads) {
  return [=](auto... arguments) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
    }
  };
}
