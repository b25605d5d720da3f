// From the registers of a kernel whose blocks own one tile of flat elements each, into the dense weights.
#pragma once

#include <type_traits>

#include "../scatter.h"
#include "pack.cuh"

namespace pecker {

static_assert(kTile == kScatterTile, "a thread block is a tile of the table");

// The run of one element of this block's tile. Every run has at least one element, so that the run number rises by
// less than the element number: where each weight is a run, and where a tile has one run, nothing is left to search.
__device__ __forceinline__ std::int64_t run_in_tile(const ScatterTable& table, std::int64_t element) {
  const std::int64_t first = __ldg(table.tile_run + blockIdx.x);
  const int span = static_cast<int>(__ldg(table.tile_run + blockIdx.x + 1) - first);
  const int position = static_cast<int>(element - blockIdx.x * kTile);
  int low = max(0, span - (static_cast<int>(kTile) - position)), high = min(span, position);
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(table.run_flat_offset + first + middle) <= element) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return first + low;
}

// Where an element of `run` goes.
struct Destination {
  std::int64_t address;  // of the dense weight; 0: a view of the flat buffer, nothing is written
  std::int64_t offset;   // in elements
  std::int32_t dtype;
};

__device__ __forceinline__ Destination destination(const ScatterTable& table, std::int64_t run, std::int64_t element) {
  const std::int32_t parameter = __ldg(table.run_parameter + run);
  return {__ldg(table.dense_pointers + parameter),
          __ldg(table.run_dense_offset + run) + (element - __ldg(table.run_flat_offset + run)),
          __ldg(table.dense_dtypes + parameter)};
}

// Where a pack goes: known before its values are, so that the loads of the table overlap with those of the buffers.
struct PackDestination {
  std::int64_t run;
  Destination first;
  bool in_one_run;
};

__device__ __forceinline__ PackDestination pack_destination(const ScatterTable& table, std::int64_t element,
                                                            int count) {
  if (table.num_runs == 0) return {};
  const std::int64_t run = run_in_tile(table, element);
  const bool in_one_run = count == kPack && __ldg(table.run_flat_offset + run + 1) >= element + kPack;
  return {run, destination(table, run, element), in_one_run};
}

// In assembly, because the compiler merges an assignment with the narrow stores of unaligned packs, and makes __stwb a
// store with an order.
__device__ __forceinline__ void store_word(uint2* out, uint2 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(out)), "r"(x.x), "r"(x.y));
#else
  *out = x;
#endif
}

__device__ __forceinline__ void store_word(uint4* out, uint4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(out)), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w));
#else
  *out = x;
#endif
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
#pragma unroll
      for (int k = 0; k < kWords; ++k) store_word(reinterpret_cast<Word*>(out) + k, words[k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = dense[k];
}

// Stores kCount neighbours.
template <int kCount>
__device__ __forceinline__ void store_values(const Destination& to, const float* x) {
  if (to.address == 0) return;
  switch (to.dtype) {
    case kFloat32:
      return store_dense<float, kCount>(x, reinterpret_cast<float*>(to.address) + to.offset);
    case kBfloat16:
      return store_dense<Bfloat16, kCount>(x, reinterpret_cast<Bfloat16*>(to.address) + to.offset);
    case kFloat16:
      return store_dense<Float16, kCount>(x, reinterpret_cast<Float16*>(to.address) + to.offset);
    case kFloat64:
      return store_dense<double, kCount>(x, reinterpret_cast<double*>(to.address) + to.offset);
  }
}

__device__ __forceinline__ void scatter_pack(const ScatterTable& table, const PackDestination& to,
                                             std::int64_t element, int count, Pack pack) {
  if (table.num_runs == 0) return;
  if (to.in_one_run) {
    store_values<kPack>(to.first, pack.x);
    return;
  }
  std::int64_t run = to.run;
  // The values move to the front one by one: a pack that is indexed at run time would have to lie in local memory.
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    while (__ldg(table.run_flat_offset + run + 1) <= element + k) ++run;
    store_values<1>(destination(table, run, element + k), pack.x);
#pragma unroll
    for (int j = 1; j < kPack; ++j) pack.x[j - 1] = pack.x[j];
  }
}

}  // namespace pecker
