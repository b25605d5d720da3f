// A pack is the kPack consecutive flat elements of one thread, and its way from and to memory: kWide is a whole pack of
// aligned buffers; the tail and unaligned buffers go element by element.
#pragma once

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

// Every buffer is read and written once a step: marked as streams, they leave the caches to the table and the model.
template <bool kWide>
__device__ __forceinline__ Pack load_pack(const float* buffer, std::int64_t element, int count) {
  if constexpr (kWide) {
    const float4 x = __ldcs(reinterpret_cast<const float4*>(buffer + element));
    return {x.x, x.y, x.z, x.w};
  } else {
    Pack pack = {};
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (k < count) pack.x[k] = buffer[element + k];
    }
    return pack;
  }
}

template <bool kWide>
__device__ __forceinline__ void store_pack(float* buffer, std::int64_t element, int count, const Pack& pack) {
  if constexpr (kWide) {
    __stcs(reinterpret_cast<float4*>(buffer + element), make_float4(pack.x[0], pack.x[1], pack.x[2], pack.x[3]));
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (k < count) buffer[element + k] = pack.x[k];
    }
  }
}

}  // namespace pecker
