// Stream compaction in one pass over the values: decoupled look-back (D. Merrill and M. Garland 2016), by
// which a thread block learns how many active values lie before its tile while later tiles are being read.
#include "../compact_active.h"

#include <algorithm>

#include "array_table.cuh"

namespace pecker {
namespace {

constexpr const char* kOp = "compact_active_cuda";
constexpr int kWarps = kSelectThreads / kWarp;
constexpr int kBlocksPerProcessor = 3;

// What other blocks may know of a tile's count: nothing yet (0), its own, or with those of all tiles before.
// Count and state are one word, so that nobody reads one without the other.
using Word = unsigned long long;
constexpr Word kOwn = Word{1} << 62, kInclusive = Word{1} << 63, kCountMask = kOwn - 1;

struct Workspace {
  Word* ticket;         // [1] the next tile; zero, as the words
  Word* above;          // [num_tiles] values above the threshold
  Word* equal;          // [num_tiles] values equal to it
  ArrayEntry* entries;  // [num_arrays + 1]
};

Workspace workspace_at(void* address, std::int64_t num_tiles) {
  Word* ticket = static_cast<Word*>(address);
  Word* above = ticket + 1;
  Word* equal = above + num_tiles;
  return {ticket, above, equal, reinterpret_cast<ArrayEntry*>(equal + num_tiles)};
}

__device__ __forceinline__ Word sum_of_warp(Word value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// By a whole warp: publishes the count of `tile` and returns that of all tiles before. Tiles are handed out
// in order, so that the blocks waited for are running.
__device__ Word count_before(volatile Word* words, std::int64_t tile, Word count) {
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) words[tile] = kOwn | count;
  Word before = 0;
  for (std::int64_t last = tile - 1;; last -= kWarp) {
    Word word;
    do {
      word = kInclusive;
      if (last >= lane) word = words[last - lane];
    } while (__any_sync(kAllLanes, word == 0));
    const unsigned inclusive = __ballot_sync(kAllLanes, (word & kInclusive) != 0);
    const int nearest = inclusive ? __ffs(static_cast<int>(inclusive)) - 1 : kWarp - 1;
    before += sum_of_warp(lane <= nearest ? word & kCountMask : 0);
    if (inclusive) break;
  }
  if (lane == 0) words[tile] = kInclusive | (before + count);
  return before;
}

// One bit a value of this thread: pack j, value e is bit j * values a pack + e.
struct Classes {
  unsigned above, equal;
};

// Every warp has neighbouring packs: of lane 0 to 31, then the next 32.
template <typename Float>
__device__ __forceinline__ std::int64_t pack_offset(int j) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return ((warp * kSelectPacks + j) * kWarp + lane) * kPackValues<Float>;
}

template <typename Float>
__device__ __forceinline__ Classes classes_of(const AlignedArray<Float>& array, std::int64_t start,
                                              Key<Float> threshold) {
  constexpr int kValues = kPackValues<Float>;
  Classes classes{0, 0};
  const auto classify = [&](Float x, int bit) {
    const Key<Float> key = key_of(x);
    classes.above |= static_cast<unsigned>(key > threshold) << bit;
    classes.equal |= static_cast<unsigned>(key == threshold) << bit;
  };
  if (start >= array.begin && start + kTileValues<Float> <= array.end) {
    Values<Float> packs[kSelectPacks];
#pragma unroll
    for (int j = 0; j < kSelectPacks; ++j) packs[j] = load_values(array.base + start + pack_offset<Float>(j));
#pragma unroll
    for (int j = 0; j < kSelectPacks; ++j) {
#pragma unroll
      for (int e = 0; e < kValues; ++e) classify(packs[j].x[e], j * kValues + e);
    }
  } else {
#pragma unroll
    for (int bit = 0; bit < kSelectPacks * kValues; ++bit) {
      const std::int64_t i = start + pack_offset<Float>(bit / kValues) + bit % kValues;
      if (i >= array.begin && i < array.end) classify(__ldg(array.base + i), bit);
    }
  }
  return classes;
}

// The numbers of set bits of the packs, one in each byte: at most 128 a warp, so that none runs over.
template <typename Float>
__device__ __forceinline__ unsigned packed_counts(unsigned bits) {
  constexpr int kValues = kPackValues<Float>;
  unsigned counts = 0;
#pragma unroll
  for (int j = 0; j < kSelectPacks; ++j) {
    counts |= static_cast<unsigned>(__popc(bits >> j * kValues & ((1u << kValues) - 1))) << 8 * j;
  }
  return counts;
}

// Of one class of values, a byte a pack: how many of this warp's come before this thread's in it, and how
// many this warp has in it.
struct WarpRanks {
  unsigned before, totals;
};

template <typename Float>
__device__ __forceinline__ WarpRanks ranks_in_warp(unsigned bits) {
  const int lane = threadIdx.x % kWarp;
  const unsigned own = packed_counts<Float>(bits);
  unsigned inclusive = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  return {inclusive - own, __shfl_sync(kAllLanes, inclusive, kWarp - 1)};
}

__device__ __forceinline__ unsigned byte_of(unsigned packed, int j) {
  return packed >> 8 * j & 0xFFu;
}

__device__ __forceinline__ unsigned sum_of_bytes(unsigned packed) {
  unsigned sum = 0;
#pragma unroll
  for (int j = 0; j < kSelectPacks; ++j) sum += byte_of(packed, j);
  return sum;
}

struct TileCounts {
  unsigned above, equal;
};

// What the threads of a block tell one another.
template <typename Float>
struct Shared {
  std::int64_t tile, array;
  TileCounts warps[kWarps];
  Word above_before, equal_before;            // in all tiles before this one
  unsigned short staged[kTileValues<Float>];  // positions of the active values in the tile, in order
};

// The sum over all warps before this one, and over all.
__device__ __forceinline__ void sum_warps(const TileCounts* warps, TileCounts& before, TileCounts& total) {
  const int warp = threadIdx.x / kWarp;
  before = total = {0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total.above += warps[w].above;
    total.equal += warps[w].equal;
  }
}

// Puts the active values in order, `ties` of the tile's equal ones among them; `before` is what the warps
// before this one have.
template <typename Float>
__device__ __forceinline__ void stage(const Classes& classes, const WarpRanks& above, const WarpRanks& equal,
                                      TileCounts before, unsigned ties, unsigned short* staged) {
  constexpr int kValues = kPackValues<Float>;
#pragma unroll
  for (int j = 0; j < kSelectPacks; ++j) {
    unsigned larger = before.above + byte_of(above.before, j);
    unsigned same = before.equal + byte_of(equal.before, j);
#pragma unroll
    for (int e = 0; e < kValues; ++e) {
      const unsigned bit = 1u << (j * kValues + e);
      const bool is_above = classes.above & bit, is_equal = classes.equal & bit;
      if (is_above || (is_equal && same < ties)) {
        staged[larger + (same < ties ? same : ties)] = static_cast<unsigned short>(pack_offset<Float>(j) + e);
      }
      larger += is_above;
      same += is_equal;
    }
    before.above += byte_of(above.totals, j);
    before.equal += byte_of(equal.totals, j);
  }
}

// Where the list of an array begins: written by its first tile, also for arrays without values before it. The
// last tile does so for those after it and the end, and fills what nobody else writes.
__device__ void write_ends(const ArrayTable& table, std::int64_t tile, std::int64_t array, std::int64_t begin,
                           std::int64_t end, const CompactOutput& out) {
  if (threadIdx.x == 0) {
    for (std::int64_t a = array; a >= 0 && table.entries[a].first_tile == tile; --a) out.offsets[a] = begin;
  }
  if (tile < table.num_tiles - 1) return;
  for (std::int64_t a = array + 1 + threadIdx.x; a <= table.num_arrays; a += kSelectThreads) {
    out.offsets[a] = end;
  }
  for (std::int64_t i = end + threadIdx.x; i < out.capacity; i += kSelectThreads) out.index[i] = -1;
}

template <typename Float>
__global__ void __launch_bounds__(kSelectThreads, kBlocksPerProcessor)
    compact_kernel(ArrayTable table, CompactInput input, CompactOutput out, Word* ticket, Word* above_words,
                   Word* equal_words) {
  __shared__ Shared<Float> shared;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) {
    Word next = 0;
    if (lane == 0) next = atomicAdd(ticket, Word{1});
    next = __shfl_sync(kAllLanes, next, 0);
    const std::int64_t found = find_array(table, static_cast<std::int64_t>(next));
    if (lane == 0) shared.tile = static_cast<std::int64_t>(next);
    if (lane == 0) shared.array = found;
  }
  const Key<Float> threshold = key_of(*static_cast<const Float*>(input.threshold));
  const std::int64_t ties = *input.ties;
  __syncthreads();

  const std::int64_t tile = shared.tile;
  const ArrayEntry entry = table.entries[shared.array];
  const AlignedArray<Float> array = aligned_array<Float>(entry.data, entry.numel);
  const std::int64_t start = (tile - entry.first_tile) * kTileValues<Float>;
  const Classes classes = classes_of(array, start, threshold);
  const WarpRanks above = ranks_in_warp<Float>(classes.above), equal = ranks_in_warp<Float>(classes.equal);
  if (lane == 0) shared.warps[warp] = {sum_of_bytes(above.totals), sum_of_bytes(equal.totals)};
  __syncthreads();

  TileCounts before, total;
  sum_warps(shared.warps, before, total);
  if (warp == 0) {
    const Word count = count_before(above_words, tile, total.above);
    if (lane == 0) shared.above_before = count;
  } else if (warp == 1) {
    const Word count = count_before(equal_words, tile, total.equal);
    if (lane == 0) shared.equal_before = count;
  }
  __syncthreads();

  const std::int64_t above_before = static_cast<std::int64_t>(shared.above_before);
  const std::int64_t equal_before = static_cast<std::int64_t>(shared.equal_before);
  const std::int64_t tile_ties = active_ties(total.equal, equal_before, ties);
  const std::int64_t begin = above_before + active_ties(equal_before, 0, ties);
  const std::int64_t count = total.above + tile_ties;
  stage<Float>(classes, above, equal, before, static_cast<unsigned>(tile_ties), shared.staged);
  __syncthreads();

  for (std::int64_t i = threadIdx.x; i < count && begin + i < out.capacity; i += kSelectThreads) {
    out.index[begin + i] = start - array.begin + shared.staged[i];
  }
  write_ends(table, tile, shared.array, begin, begin + count, out);
}

}  // namespace

template <typename Float>
std::int64_t compact_workspace_bytes(const std::vector<SelectArray>& arrays) {
  const std::int64_t num_tiles = array_entries<Float>(arrays).back().first_tile;
  return (1 + 2 * num_tiles) * static_cast<std::int64_t>(sizeof(Word)) +
         static_cast<std::int64_t>((arrays.size() + 1) * sizeof(ArrayEntry));
}

template <typename Float>
void compact_active_cuda(const std::vector<SelectArray>& arrays, const CompactInput& input,
                         const CompactOutput& output, void* workspace, std::uintptr_t stream) {
  const std::vector<ArrayEntry> entries = array_entries<Float>(arrays);
  const std::int64_t num_tiles = entries.back().first_tile;
  if (num_tiles > kMaxTiles) throw std::invalid_argument("expected fewer values in all");
  const Workspace parts = workspace_at(workspace, num_tiles);
  const ArrayTable table = copy_table(kOp, entries, parts.entries, stream);
  const std::size_t words = static_cast<std::size_t>(1 + 2 * num_tiles);
  check_cuda(cudaMemsetAsync(parts.ticket, 0, words * sizeof(Word), reinterpret_cast<cudaStream_t>(stream)),
             kOp);
  launch(kOp, compact_kernel<Float>, num_tiles, kSelectThreads, stream, table, input, output, parts.ticket,
         parts.above, parts.equal);
}

template void compact_active_cuda<float>(const std::vector<SelectArray>&, const CompactInput&,
                                         const CompactOutput&, void*, std::uintptr_t);
template void compact_active_cuda<double>(const std::vector<SelectArray>&, const CompactInput&,
                                          const CompactOutput&, void*, std::uintptr_t);
template std::int64_t compact_workspace_bytes<float>(const std::vector<SelectArray>&);
template std::int64_t compact_workspace_bytes<double>(const std::vector<SelectArray>&);

}  // namespace pecker
