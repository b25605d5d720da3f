// The AdamW step of a whole model in one launch: flat, coalesced reads and writes of the optimizer state,
// then the new values straight from registers to the dense weights.
#include "../masked_adamw.h"
#include "pack.cuh"

namespace pecker {
namespace {

template <bool kHasExpAvg, bool kHasEma, bool kHasSaliency>
__global__ void __launch_bounds__(kThreads)
    masked_adamw_kernel(AdamwBuffers b, AdamwConstants c, ScatterTable table, bool aligned) {
  const std::int64_t tile = blockIdx.x * kTile;
  const std::int64_t element = tile + threadIdx.x * kPack;
  const int count = pack_count(element, b.numel);

  // Loaded before the search for the runs, whose latency they then share.
  const Pack grad = load_pack(b.grad, element, count, aligned);
  Pack value = load_pack(b.value, element, count, aligned);
  Pack exp_avg = kHasExpAvg ? load_pack(b.exp_avg, element, count, aligned) : Pack{};
  Pack exp_avg_sq = load_pack(b.exp_avg_sq, element, count, aligned);
  Pack ema = kHasEma ? load_pack(b.ema, element, count, aligned) : Pack{};
  Pack saliency = kHasSaliency ? load_pack(b.saliency, element, count, aligned) : Pack{};
  const std::int64_t end = tile + kTile < b.numel ? tile + kTile : b.numel;
  const longlong2 runs = table.num_runs > 0 ? tile_runs(table, tile, end) : longlong2{0, 0};

#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    AdamwState s{value.x[k], exp_avg.x[k], exp_avg_sq.x[k], ema.x[k], saliency.x[k]};
    adamw_update<kHasExpAvg, kHasEma, kHasSaliency>(c, grad.x[k], s);
    value.x[k] = s.value;
    exp_avg.x[k] = s.exp_avg;
    exp_avg_sq.x[k] = s.exp_avg_sq;
    ema.x[k] = s.ema;
    saliency.x[k] = s.saliency;
  }

  store_pack(b.value, element, count, aligned, value);
  if (kHasExpAvg) store_pack(b.exp_avg, element, count, aligned, exp_avg);
  store_pack(b.exp_avg_sq, element, count, aligned, exp_avg_sq);
  if (kHasEma) store_pack(b.ema, element, count, aligned, ema);
  if (kHasSaliency) store_pack(b.saliency, element, count, aligned, saliency);
  if (table.num_runs > 0 && count > 0) scatter_pack(table, runs, element, count, value);
}

using Kernel = void (*)(AdamwBuffers, AdamwConstants, ScatterTable, bool);

// Indexed [has exp_avg][has ema][has saliency].
const Kernel kKernels[2][2][2] = {
    {{masked_adamw_kernel<false, false, false>, masked_adamw_kernel<false, false, true>},
     {masked_adamw_kernel<false, true, false>, masked_adamw_kernel<false, true, true>}},
    {{masked_adamw_kernel<true, false, false>, masked_adamw_kernel<true, false, true>},
     {masked_adamw_kernel<true, true, false>, masked_adamw_kernel<true, true, true>}}};

}  // namespace

void masked_adamw_cuda(const AdamwBuffers& b, const AdamwConstants& constants, const ScatterTable& table,
                       std::uintptr_t stream) {
  if (b.numel == 0) return;
  // A null pointer counts as aligned.
  const bool aligned = is_aligned(b.value) && is_aligned(b.grad) && is_aligned(b.exp_avg) &&
                       is_aligned(b.exp_avg_sq) && is_aligned(b.ema) && is_aligned(b.saliency);
  const Kernel kernel = kKernels[b.exp_avg != nullptr][b.ema != nullptr][b.saliency != nullptr];
  kernel<<<tiles(b.numel), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(b, constants, table,
                                                                                  aligned);
  check_cuda(cudaGetLastError(), "masked_adamw_cuda");
}

}  // namespace pecker
