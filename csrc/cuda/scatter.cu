#include "../scatter.h"
#include "pack.cuh"

namespace pecker {
namespace {

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const float* value, std::int64_t numel, ScatterTable table, bool aligned) {
  const std::int64_t tile = blockIdx.x * kTile;
  const std::int64_t element = tile + threadIdx.x * kPack;
  const int count = pack_count(element, numel);
  const Pack pack = load_pack(value, element, count, aligned);
  const longlong2 runs = tile_runs(table, tile, tile + kTile < numel ? tile + kTile : numel);
  if (count > 0) scatter_pack(table, runs, element, count, pack);
}

}  // namespace

void scatter_cuda(const float* value, std::int64_t numel, const ScatterTable& table, std::uintptr_t stream) {
  if (numel == 0 || table.num_runs == 0) return;
  scatter_kernel<<<tiles(numel), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(value, numel, table,
                                                                                        is_aligned(value));
  check_cuda(cudaGetLastError(), "scatter_cuda");
}

}  // namespace pecker
