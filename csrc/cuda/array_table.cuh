// Many arrays as one row of tiles: what lets one launch read a whole model's saliency, with 16-byte loads.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../select_threshold.h"
#include "launch.cuh"

namespace pecker {

constexpr int kSelectThreads = 512;
constexpr int kSelectPacks = 4;  // 16-byte loads in flight a thread
constexpr int kPackBytes = 16;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;

template <typename Float>
constexpr int kPackValues = kPackBytes / static_cast<int>(sizeof(Float));
template <typename Float>
constexpr std::int64_t kTileValues = std::int64_t{kSelectThreads} * kSelectPacks * kPackValues<Float>;

struct ArrayEntry {
  const void* data;
  std::int64_t numel;
  std::int64_t first_tile;  // an array without values has none: the next one starts with the same
};

struct ArrayTable {
  const ArrayEntry* entries;  // [num_arrays + 1]; the last one is empty and starts where the tiles end
  std::int64_t num_arrays, num_tiles;
};

// An array counted from the 16-byte boundary at or before its first value, so that packs are aligned: of the
// values at `base` those in [begin, end) are the array's.
template <typename Float>
struct AlignedArray {
  const Float* base;
  std::int64_t begin, end;
};

template <typename Float>
PECKER_HOST_DEVICE AlignedArray<Float> aligned_array(const void* data, std::int64_t numel) {
  const std::int64_t past = reinterpret_cast<std::uintptr_t>(data) % kPackBytes / sizeof(Float);
  return {static_cast<const Float*>(data) - past, past, past + numel};
}

template <typename Float>
struct Values {
  Float x[kPackValues<Float>];
};

template <typename Float>
__device__ __forceinline__ Values<Float> load_values(const Float* address) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(address));
  Values<Float> values;
  std::memcpy(&values, &words, sizeof values);
  return values;
}

// The array of a tile, searched by a whole warp: 32 probes a round.
__device__ __forceinline__ std::int64_t find_array(const ArrayTable& table, std::int64_t tile) {
  const int lane = threadIdx.x % kWarp;
  std::int64_t first = 0, count = table.num_arrays;  // it lies in [first, first + count)
  while (count > 1) {
    const std::int64_t stride = (count + kWarp - 1) / kWarp;
    const std::int64_t probe = lane * stride;
    const bool before = probe < count && table.entries[first + probe].first_tile <= tile;
    const std::int64_t skipped = (__popc(__ballot_sync(kAllLanes, before)) - 1) * stride;
    first += skipped;
    count = stride < count - skipped ? stride : count - skipped;
  }
  return first;
}

// A launch that a C++ compiler can read as well: tests run these kernels on the host.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
            std::uintptr_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op);
}

constexpr int kChunkEntries = 160;  // as many as fit into the 4 KB of a kernel's parameters

struct ArrayTableChunk {
  ArrayEntry entries[kChunkEntries];
};

static __global__ void __launch_bounds__(kChunkEntries)
    copy_entries_kernel(const __grid_constant__ ArrayTableChunk chunk, ArrayEntry* out, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) out[i] = chunk.entries[i];
}

template <typename Float>
std::vector<ArrayEntry> array_entries(const std::vector<SelectArray>& arrays) {
  std::vector<ArrayEntry> entries;
  std::int64_t tile = 0;
  for (const SelectArray& array : arrays) {
    entries.push_back({array.data, array.numel, tile});
    const std::int64_t end = aligned_array<Float>(array.data, array.numel).end;
    tile += array.numel == 0 ? 0 : (end + kTileValues<Float> - 1) / kTileValues<Float>;
  }
  entries.push_back({nullptr, 0, tile});
  return entries;
}

// Writes the table to `entries`, in device memory. It travels as kernel parameters: no pinned memory, no copy
// that waits, and a CUDA graph keeps it by value.
inline ArrayTable copy_table(const char* op, const std::vector<ArrayEntry>& host, ArrayEntry* entries,
                             std::uintptr_t stream) {
  for (std::size_t i = 0; i < host.size(); i += kChunkEntries) {
    const std::size_t count = std::min(host.size() - i, std::size_t{kChunkEntries});
    ArrayTableChunk chunk = {};
    std::copy_n(host.begin() + static_cast<std::ptrdiff_t>(i), count, chunk.entries);
    launch(op, copy_entries_kernel, 1, kChunkEntries, stream, chunk, entries + i, static_cast<int>(count));
  }
  return {entries, static_cast<std::int64_t>(host.size()) - 1, host.back().first_tile};
}

}  // namespace pecker
