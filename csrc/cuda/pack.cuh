// A pack is the kPack consecutive flat elements of one thread, and its way to and from memory. A short pack
// (the tail) and unaligned buffers take the element-wise path.
#pragma once

#include <type_traits>

#include "../scatter.h"
#include "launch.cuh"

namespace pecker {

struct Pack {
  float x[kPack];
};

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(float4) == 0;
}

// How many elements the pack that starts at `element` has: fewer than kPack, or none, at the end.
__device__ __forceinline__ int pack_count(std::int64_t element, std::int64_t numel) {
  const std::int64_t left = numel - element;
  return left >= kPack ? kPack : left > 0 ? static_cast<int>(left) : 0;
}

__device__ __forceinline__ Pack load_pack(const float* buffer, std::int64_t element, int count,
                                          bool aligned) {
  Pack pack = {};
  if (aligned && count == kPack) {
    const float4 x = *reinterpret_cast<const float4*>(buffer + element);
    pack = {x.x, x.y, x.z, x.w};
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (k < count) pack.x[k] = buffer[element + k];
    }
  }
  return pack;
}

__device__ __forceinline__ void store_pack(float* buffer, std::int64_t element, int count, bool aligned,
                                           const Pack& pack) {
  if (aligned && count == kPack) {
    *reinterpret_cast<float4*>(buffer + element) = make_float4(pack.x[0], pack.x[1], pack.x[2], pack.x[3]);
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (k < count) buffer[element + k] = pack.x[k];
    }
  }
}

// The run of `element`, searched by a whole warp: 32 probes a round, so 5 rounds of memory latency for 30
// million runs where a binary search has 25.
__device__ __forceinline__ std::int64_t warp_find_run(const ScatterTable& table, std::int64_t element) {
  const int lane = threadIdx.x % warpSize;
  std::int64_t first = 0, count = table.num_runs;  // the run lies in [first, first + count)
  while (count > 1) {
    const std::int64_t stride = (count + warpSize - 1) / warpSize;
    const std::int64_t probe = lane * stride;
    const bool starts_before = probe < count && table.run_flat_offset[first + probe] <= element;
    const std::int64_t skipped = (__popc(__ballot_sync(0xFFFFFFFFu, starts_before)) - 1) * stride;
    first += skipped;
    count = stride < count - skipped ? stride : count - skipped;
  }
  return first;
}

// The runs of the first and the last element of this block's tile, between which all its threads search.
__device__ __forceinline__ longlong2 tile_runs(const ScatterTable& table, std::int64_t begin,
                                               std::int64_t end) {
  __shared__ std::int64_t runs[2];
  const int warp = threadIdx.x / warpSize;
  if (warp < 2) {
    const std::int64_t run = warp_find_run(table, warp == 0 ? begin : end - 1);
    if (threadIdx.x % warpSize == 0) runs[warp] = run;
  }
  __syncthreads();
  return {runs[0], runs[1]};
}

// Converts kCount values and stores them at `out`, a whole pack with wide accesses where the address allows.
template <typename Dense, int kCount>
__device__ __forceinline__ void store_dense(const float* x, Dense* out) {
  Dense dense[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) convert(x[k], dense[k]);
  if constexpr (kCount == kPack) {
    using Word = std::conditional_t<sizeof(Dense) == sizeof(std::uint16_t), uint2, uint4>;
    if (reinterpret_cast<std::uintptr_t>(out) % sizeof(Word) == 0) {
      constexpr int kWords = sizeof dense / sizeof(Word);
      Word words[kWords];
      std::memcpy(words, dense, sizeof dense);
      // __stwb and not an assignment, which the compiler would merge with the narrow stores below.
#pragma unroll
      for (int k = 0; k < kWords; ++k) __stwb(reinterpret_cast<Word*>(out) + k, words[k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = dense[k];
}

// Scatters the kCount values from `element` on, which all lie in `run`.
template <int kCount>
__device__ __forceinline__ void scatter_values(const ScatterTable& table, std::int64_t run,
                                               std::int64_t element, const float* x) {
  const std::int32_t parameter = table.run_parameter[run];
  const std::int64_t address = table.dense_pointers[parameter];
  const std::int64_t offset = table.run_dense_offset[run] + (element - table.run_flat_offset[run]);
  if (address == 0) return;
  switch (table.dense_dtypes[parameter]) {
    case kFloat32:
      return store_dense<float, kCount>(x, reinterpret_cast<float*>(address) + offset);
    case kBfloat16:
      return store_dense<Bfloat16, kCount>(x, reinterpret_cast<Bfloat16*>(address) + offset);
    case kFloat16:
      return store_dense<Float16, kCount>(x, reinterpret_cast<Float16*>(address) + offset);
    case kFloat64:
      return store_dense<double, kCount>(x, reinterpret_cast<double*>(address) + offset);
  }
}

__device__ __forceinline__ void scatter_pack(const ScatterTable& table, longlong2 runs, std::int64_t element,
                                             int count, const Pack& pack) {
  std::int64_t run = find_run(table, element, runs.x, runs.y);
  if (count == kPack && table.run_flat_offset[run + 1] >= element + kPack) {
    scatter_values<kPack>(table, run, element, pack.x);
    return;
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    if (k >= count) break;
    while (table.run_flat_offset[run + 1] <= element + k) ++run;
    scatter_values<1>(table, run, element + k, pack.x + k);
  }
}

}  // namespace pecker
