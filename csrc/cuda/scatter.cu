#include "scatter.cuh"

namespace pecker {
namespace {

template <bool kWide>
__device__ __forceinline__ void copy_pack(const float* value, const ScatterTable& table, std::int64_t element,
                                          int count) {
  const Pack pack = load_pack<kWide>(value, element, count);
  scatter_pack(table, pack_destination(table, element, count), element, count, pack);
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const float* value, std::int64_t numel, ScatterTable table, bool aligned) {
  const std::int64_t element = blockIdx.x * kTile + threadIdx.x * kPack;
  const int count = pack_count(element, numel);
  if (aligned && count == kPack) {
    copy_pack<true>(value, table, element, count);
  } else if (count > 0) {
    copy_pack<false>(value, table, element, count);
  }
}

}  // namespace

void scatter_cuda(const float* value, std::int64_t numel, const ScatterTable& table, std::uintptr_t stream) {
  if (numel == 0 || table.num_runs == 0) return;
  scatter_kernel<<<tiles(numel), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(value, numel, table,
                                                                                        is_aligned(value));
  check_cuda(cudaGetLastError(), "scatter_cuda");
}

}  // namespace pecker
