// Radix selection without a sort, a copy or a wait: per digit, one kernel counts it over all arrays and one
// chooses it. Only integers are added up, so the order of the thread blocks does not show.
#include "../select_threshold.h"

#include <algorithm>

#include "array_table.cuh"

namespace pecker {
namespace {

constexpr const char* kOp = "select_threshold_cuda";
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBlocksPerProcessor = 3;
constexpr int kChooseThreads = kBins / 2;
constexpr std::int64_t kMaxTilesPerBlock = 1 << 18;  // so that no 32-bit count overflows

// Each bin has this many counters, in neighbouring banks of shared memory: lanes of a warp that see one digit
// wait for a quarter of the others instead of all.
constexpr int kCopies = 4;

// Digits end, from the top, at bits 21, 10, 0 of a float, 53, 42, 31, 20, 9, 0 of a double.
constexpr int next_shift(int shift) {
  return shift > kDigitBits ? shift - kDigitBits : 0;
}

using Count = unsigned long long;

struct Workspace {
  Count* histogram;     // [kBins]
  Selected* state;      // [1] after the digits chosen so far
  ArrayEntry* entries;  // [num_arrays + 1]
};

Workspace workspace_at(void* address) {
  Count* histogram = static_cast<Count*>(address);
  Selected* state = reinterpret_cast<Selected*>(histogram + kBins);
  return {histogram, state, reinterpret_cast<ArrayEntry*>(state + 1)};
}

// An atomic addition to shared memory under a predicate: as a branch it costs more than the work around it.
__device__ __forceinline__ void add_if(bool condition, unsigned* counter, unsigned count) {
#ifdef __CUDA_ARCH__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(counter));
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p red.shared.add.u32 [%1], %2; }" ::"r"(
                   static_cast<unsigned>(condition)),
               "r"(address), "r"(count)
               : "memory");
#else
  if (condition) atomicAdd(counter, count);
#endif
}

// Counts neighbours of one digit in a register, so that arrays of equal values (zeros) cost one atomic
// addition a thread and not one a value.
struct RunCounter {
  unsigned* counts;  // [kBins][kCopies]
  unsigned copy;     // this lane's
  unsigned index, length;

  __device__ __forceinline__ void add_when(bool valid, unsigned digit) {
    const unsigned next = digit * kCopies | copy;
    const bool ends = valid && next != index;
    add_if(ends, counts + index, length);
    length = (ends ? 0 : length) + valid;
    index = valid ? next : index;
  }

  __device__ __forceinline__ void flush() { add_if(true, counts + index, length); }
};

// After the first pass most values have another prefix, and most packs none with it.
template <typename Float, int kShift, int kBits, int kValues>
__device__ __forceinline__ void count_values(const Float* values, Key<Float> prefix, RunCounter& run) {
  constexpr bool kFirst = kShift + kBits == 8 * sizeof(Float);
  Key<Float> shifted[kValues];
  bool any = kFirst;
#pragma unroll
  for (int e = 0; e < kValues; ++e) {
    shifted[e] = key_of(values[e]) >> kShift;
    any |= has_prefix(shifted[e], kBits, prefix);
  }
  if (!any) return;
#pragma unroll
  for (int e = 0; e < kValues; ++e) {
    run.add_when(kFirst || has_prefix(shifted[e], kBits, prefix),
                 static_cast<unsigned>(digit_of(shifted[e], kBits)));
  }
}

template <typename Float, int kShift, int kBits>
__device__ __forceinline__ void count_tile(const AlignedArray<Float>& array, std::int64_t start,
                                           Key<Float> prefix, RunCounter& run) {
  constexpr int kValues = kPackValues<Float>;
  const std::int64_t end = start + kTileValues<Float>;
  if (start >= array.begin && end <= array.end) {
    const Float* address = array.base + start + threadIdx.x * kValues;
    Values<Float> packs[kSelectPacks];
#pragma unroll
    for (int j = 0; j < kSelectPacks; ++j) {
      packs[j] = load_values(address + std::int64_t{j} * kSelectThreads * kValues);
    }
#pragma unroll
    for (int j = 0; j < kSelectPacks; ++j) {
      count_values<Float, kShift, kBits, kValues>(packs[j].x, prefix, run);
    }
  } else {
    const std::int64_t first = start > array.begin ? start : array.begin;
    const std::int64_t last = end < array.end ? end : array.end;
#pragma unroll 1
    for (std::int64_t i = first + threadIdx.x; i < last; i += kSelectThreads) {
      const Float value = __ldg(array.base + i);
      count_values<Float, kShift, kBits, 1>(&value, prefix, run);
    }
  }
}

// Adds the digits of the values that have the prefix to `histogram`. Every block takes neighbouring tiles.
template <typename Float, int kShift, int kBits>
__global__ void __launch_bounds__(kSelectThreads, kBlocksPerProcessor)
    count_digits_kernel(ArrayTable table, const Selected* state, Count* histogram) {
  static_assert(kCopies == 4, "the copies of a bin are one 16-byte word");
  __shared__ uint4 bins[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) bins[bin] = uint4{0, 0, 0, 0};
  __syncthreads();

  constexpr bool kFirst = kShift + kBits == 8 * sizeof(Float);
  const Key<Float> prefix = kFirst ? 0 : static_cast<Key<Float>>(state->key);
  const std::int64_t first = table.num_tiles * blockIdx.x / gridDim.x;
  const std::int64_t last = table.num_tiles * (blockIdx.x + std::int64_t{1}) / gridDim.x;
  RunCounter run{reinterpret_cast<unsigned*>(bins), threadIdx.x % kCopies, 0, 0};
  std::int64_t a = first < last ? find_array(table, first) : 0;
  for (std::int64_t tile = first; tile < last; ++a) {
    const ArrayEntry entry = table.entries[a];
    const std::int64_t next = table.entries[a + 1].first_tile;
    const AlignedArray<Float> array = aligned_array<Float>(entry.data, entry.numel);
    for (; tile < (next < last ? next : last); ++tile) {
      count_tile<Float, kShift, kBits>(array, (tile - entry.first_tile) * kTileValues<Float>, prefix, run);
    }
  }
  run.flush();
  __syncthreads();

  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
    const uint4 copies = bins[bin];
    const Count count = Count{copies.x} + copies.y + copies.z + copies.w;
    if (count > 0) atomicAdd(histogram + bin, count);
  }
}

// The sum of `value` over all threads before this one.
__device__ __forceinline__ Count sum_before(Count value) {
  __shared__ Count warp_sums[kChooseThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Count sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Count other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  return sum - value;
}

// One block. Finds the digit of the k-th largest, from the highest down, and empties the histogram.
template <typename Float>
__global__ void __launch_bounds__(kChooseThreads)
    choose_digit_kernel(Count* histogram, int shift, int bits, Selected before, Selected* state,
                        SelectOutput output) {
  const bool is_first = shift + bits == 8 * sizeof(Float);
  if (!is_first) before = *state;
  const int high = kBins - 1 - 2 * static_cast<int>(threadIdx.x), low = high - 1;
  const Count high_count = histogram[high], low_count = histogram[low];
  histogram[high] = histogram[low] = 0;
  const Count above = sum_before(high_count + low_count);

  const Count k = static_cast<Count>(before.ties);
  const bool is_high = holds_rank(above, high_count, k);
  const bool is_low = holds_rank(above + high_count, low_count, k);
  if (!is_high && !is_low) return;  // for all threads but one
  const std::uint64_t key = before.key << bits | static_cast<std::uint64_t>(is_high ? high : low);
  const std::int64_t ties = static_cast<std::int64_t>(k - above - (is_high ? 0 : high_count));
  *state = {key, ties};
  if (shift > 0) return;
  *static_cast<Float*>(output.threshold) = value_of<Float>(static_cast<Key<Float>>(key));
  *output.ties = ties;
}

std::int64_t num_blocks(std::int64_t num_tiles) {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), kOp);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kOp);
  const std::int64_t blocks = std::min(num_tiles, std::int64_t{processors} * kBlocksPerProcessor);
  if (num_tiles / blocks >= kMaxTilesPerBlock) throw std::invalid_argument("expected fewer values in all");
  return blocks;
}

// The passes from the digit that ends below bit `kEnd` on.
template <typename Float, int kEnd>
void run_passes(const ArrayTable& table, const Selected& before, const SelectOutput& output,
                const Workspace& workspace, std::uintptr_t stream) {
  constexpr int kShift = next_shift(kEnd), kBits = kEnd - kShift;
  launch(kOp, count_digits_kernel<Float, kShift, kBits>, num_blocks(table.num_tiles), kSelectThreads, stream,
         table, workspace.state, workspace.histogram);
  launch(kOp, choose_digit_kernel<Float>, 1, kChooseThreads, stream, workspace.histogram, kShift, kBits,
         before, workspace.state, output);
  if constexpr (kShift > 0) run_passes<Float, kShift>(table, before, output, workspace, stream);
}

}  // namespace

std::int64_t select_workspace_bytes(std::int64_t num_arrays) {
  return static_cast<std::int64_t>(kBins * sizeof(Count) + sizeof(Selected)) +
         (num_arrays + 1) * static_cast<std::int64_t>(sizeof(ArrayEntry));
}

template <typename Float>
void select_threshold_cuda(const std::vector<SelectArray>& arrays, std::int64_t k, const SelectOutput& output,
                           void* workspace, std::uintptr_t stream) {
  const Workspace parts = workspace_at(workspace);
  const ArrayTable table = copy_table(kOp, array_entries<Float>(arrays), parts.entries, stream);
  check_cuda(
      cudaMemsetAsync(parts.histogram, 0, kBins * sizeof(Count), reinterpret_cast<cudaStream_t>(stream)),
      kOp);
  run_passes<Float, 8 * sizeof(Float)>(table, {0, k}, output, parts, stream);
}

template void select_threshold_cuda<float>(const std::vector<SelectArray>&, std::int64_t, const SelectOutput&,
                                           void*, std::uintptr_t);
template void select_threshold_cuda<double>(const std::vector<SelectArray>&, std::int64_t,
                                            const SelectOutput&, void*, std::uintptr_t);

}  // namespace pecker
