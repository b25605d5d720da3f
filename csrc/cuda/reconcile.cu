#include "../reconcile.h"

#include "scatter.cuh"

namespace pecker {
namespace {

// Adds the terms of a thread to the sum of their parameter. Where a whole warp has one parameter, its lanes add theirs
// up first: the sums of a large weight would otherwise wait for one another at one address.
__device__ __forceinline__ void add_terms(std::uint64_t* sums, std::int32_t parameter, std::uint64_t terms) {
#ifdef __CUDA_ARCH__
  int one_parameter;
  __match_all_sync(0xFFFFFFFFu, parameter, &one_parameter);
  if (one_parameter) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) terms += __shfl_down_sync(0xFFFFFFFFu, terms, offset);
    if (threadIdx.x % 32 != 0) return;
  }
#endif
  if (parameter >= 0 && terms != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sums + parameter), static_cast<unsigned long long>(terms));
  }
}

// Calls visit(dense) with a reference to the weight at `to`, in its dtype.
template <typename Visit>
__device__ __forceinline__ std::uint64_t visit_weight(const Destination& to, const Visit& visit) {
  switch (to.dtype) {
    case kFloat32:
      return visit(reinterpret_cast<float*>(to.address)[to.offset]);
    case kBfloat16:
      return visit(reinterpret_cast<Bfloat16*>(to.address)[to.offset]);
    case kFloat16:
      return visit(reinterpret_cast<Float16*>(to.address)[to.offset]);
    default:
      return visit(reinterpret_cast<double*>(to.address)[to.offset]);
  }
}

// One pack a thread: visit(element, parameter, destination) for each weight that has a dense one, terms summed.
template <typename Visit>
__device__ __forceinline__ void visit_pack(std::int64_t numel, const ScatterTable& table, std::uint64_t* sums,
                                           const Visit& visit) {
  const std::int64_t element = blockIdx.x * kTile + threadIdx.x * kPack;
  const int count = pack_count(element, numel);
  std::int32_t parameter = -1;
  std::uint64_t terms = 0;
  std::int64_t run = count > 0 ? run_in_tile(table, element) : 0;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    while (__ldg(table.run_flat_offset + run + 1) <= element + k) ++run;
    const std::int32_t of = __ldg(table.run_parameter + run);
    if (of != parameter) {
      if (terms != 0) atomicAdd(reinterpret_cast<unsigned long long*>(sums + parameter),
                                static_cast<unsigned long long>(terms));
      parameter = of;
      terms = 0;
    }
    const Destination to = destination(table, run, element + k);
    if (to.address != 0) terms += visit(element + k, of, to);
  }
  add_terms(sums, parameter, terms);
}

__global__ void __launch_bounds__(kThreads)
    checksums_kernel(std::int64_t numel, ScatterTable table, std::int64_t base, std::uint64_t* sums) {
  visit_pack(numel, table, sums, [&](std::int64_t element, std::int32_t, const Destination& to) {
    return visit_weight(to, [&](auto& dense) { return checksum_term(base + element, to_float(dense)); });
  });
}

__global__ void __launch_bounds__(kThreads)
    reconcile_kernel(float* value, std::int64_t numel, ScatterTable table, Reconciliation which, std::int64_t base,
                     std::uint64_t* sums) {
  visit_pack(numel, table, sums, [&](std::int64_t element, std::int32_t parameter, const Destination& to) {
    const bool written = which.written[parameter];
    return visit_weight(to, [&](auto& dense) {
      return reconcile_weight(base + element, value[element], dense, written, which.follow);
    });
  });
}

}  // namespace

void dense_checksums_cuda(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                          std::uintptr_t stream) {
  if (numel == 0 || table.num_runs == 0) return;
  checksums_kernel<<<tiles(numel), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(numel, table, base, sums);
  check_cuda(cudaGetLastError(), "dense_checksums_cuda");
}

void reconcile_cuda(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                    std::int64_t base, std::uint64_t* sums, std::uintptr_t stream) {
  if (numel == 0 || table.num_runs == 0) return;
  reconcile_kernel<<<tiles(numel), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(value, numel, table, which,
                                                                                          base, sums);
  check_cuda(cudaGetLastError(), "reconcile_cuda");
}

}  // namespace pecker
