// The AdamW step of a whole model in one launch: flat, coalesced reads and writes of the optimizer state,
// then the new values straight from registers to the dense weights.
#include "../masked_adamw.h"
#include "scatter.cuh"

namespace pecker {
namespace {

// Multiprocessors hold so many blocks or more, five of the usual ones. Without the bound the compiler aims at 40
// registers for the smallest kernel, and spills.
constexpr int kMinBlocks = 3;

template <bool kWide, bool kHasExpAvg, bool kHasEma, bool kHasSaliency>
__device__ __forceinline__ void step_pack(const AdamwBuffers& b, const AdamwConstants& c, const ScatterTable& table,
                                          std::int64_t element, int count) {
  const Pack grad = load_pack<kWide>(b.grad, element, count);
  Pack value = load_pack<kWide>(b.value, element, count);
  Pack exp_avg = kHasExpAvg ? load_pack<kWide>(b.exp_avg, element, count) : Pack{};
  Pack exp_avg_sq = load_pack<kWide>(b.exp_avg_sq, element, count);
  Pack ema = kHasEma ? load_pack<kWide>(b.ema, element, count) : Pack{};
  Pack saliency = kHasSaliency ? load_pack<kWide>(b.saliency, element, count) : Pack{};
  const PackDestination to = pack_destination(table, element, count);

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

  store_pack<kWide>(b.value, element, count, value);
  if (kHasExpAvg) store_pack<kWide>(b.exp_avg, element, count, exp_avg);
  store_pack<kWide>(b.exp_avg_sq, element, count, exp_avg_sq);
  if (kHasEma) store_pack<kWide>(b.ema, element, count, ema);
  if (kHasSaliency) store_pack<kWide>(b.saliency, element, count, saliency);
  scatter_pack(table, to, element, count, value);
}

// Constants by value are operands of the instructions; those in device memory take registers.
__device__ __forceinline__ const AdamwConstants& read(const AdamwConstants& constants) {
  return constants;
}

__device__ __forceinline__ AdamwConstants read(const AdamwConstants* constants) {
  constexpr int kWords = sizeof(AdamwConstants) / sizeof(uint4);
  uint4 words[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) words[k] = __ldg(reinterpret_cast<const uint4*>(constants) + k);
  AdamwConstants c;
  std::memcpy(&c, words, sizeof c);
  return c;
}

template <bool kHasExpAvg, bool kHasEma, bool kHasSaliency, typename Constants>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    masked_adamw_kernel(AdamwBuffers b, Constants constants, ScatterTable table, bool aligned) {
  const std::int64_t element = blockIdx.x * kTile + threadIdx.x * kPack;
  const int count = pack_count(element, b.numel);
  if (aligned && count == kPack) {
    step_pack<true, kHasExpAvg, kHasEma, kHasSaliency>(b, read(constants), table, element, count);
  } else if (count > 0) {
    step_pack<false, kHasExpAvg, kHasEma, kHasSaliency>(b, read(constants), table, element, count);
  }
}

__global__ void constants_kernel(AdamwSettings settings, AdamwDeviceNumbers numbers) {
  if (numbers.step) settings.step = static_cast<std::int64_t>(*numbers.step);
  if (numbers.lr && numbers.lr_is_double) settings.lr = *static_cast<const double*>(numbers.lr);
  if (numbers.lr && !numbers.lr_is_double) settings.lr = *static_cast<const float*>(numbers.lr);
  *numbers.constants = adamw_constants(settings);
}

template <typename Constants>
void launch(const AdamwBuffers& b, const Constants& constants, const ScatterTable& table, cudaStream_t stream) {
  using Kernel = void (*)(AdamwBuffers, Constants, ScatterTable, bool);
  // Indexed [has exp_avg][has ema][has saliency].
  static const Kernel kKernels[2][2][2] = {
      {{masked_adamw_kernel<false, false, false>, masked_adamw_kernel<false, false, true>},
       {masked_adamw_kernel<false, true, false>, masked_adamw_kernel<false, true, true>}},
      {{masked_adamw_kernel<true, false, false>, masked_adamw_kernel<true, false, true>},
       {masked_adamw_kernel<true, true, false>, masked_adamw_kernel<true, true, true>}}};
  // A null pointer counts as aligned.
  const bool aligned = is_aligned(b.value) && is_aligned(b.grad) && is_aligned(b.exp_avg) &&
                       is_aligned(b.exp_avg_sq) && is_aligned(b.ema) && is_aligned(b.saliency);
  const Kernel kernel = kKernels[b.exp_avg != nullptr][b.ema != nullptr][b.saliency != nullptr];
  kernel<<<tiles(b.numel), kThreads, 0, stream>>>(b, constants, table, aligned);
  check_cuda(cudaGetLastError(), "masked_adamw_cuda");
}

}  // namespace

void masked_adamw_cuda(const AdamwBuffers& b, const AdamwSettings& settings, const AdamwDeviceNumbers& numbers,
                       const ScatterTable& table, std::uintptr_t stream_address) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (tiles(b.numel) == 0) return;
  if (numbers.constants == nullptr) return launch(b, adamw_constants(settings), table, stream);
  constants_kernel<<<1, 1, 0, stream>>>(settings, numbers);
  check_cuda(cudaGetLastError(), "masked_adamw_cuda: constants");
  launch(b, static_cast<const AdamwConstants*>(numbers.constants), table, stream);
}

}  // namespace pecker
