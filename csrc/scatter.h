// Scatter: copies the flat buffer of active weights to where they live in the model's dense tensors.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace pecker {

constexpr std::int64_t kScatterTile = 1024;  // flat elements

// Run r is a stretch of weights that is contiguous both in the flat buffer and in one dense tensor: flat
// [run_flat_offset[r], run_flat_offset[r + 1]) goes to run_dense_offset[r] of parameter run_parameter[r].
struct ScatterTable {
  const std::int64_t* dense_pointers;  // [num_parameters] address; 0: a view of the flat buffer, not written
  const std::int32_t* dense_dtypes;    // [num_parameters] DenseDtype
  const std::int32_t* run_parameter;   // [num_runs]
  const std::int64_t* run_dense_offset;  // [num_runs] in elements, in memory order
  const std::int64_t* run_flat_offset;   // [num_runs + 1] sorted, from 0 to numel; no run is empty
  // [ceil(numel / kScatterTile) + 1] run of element t * kScatterTile, and at last that of numel - 1. It spares a GPU
  // the search through the whole table; on the CPU, where a thread walks along the runs, it may be null.
  const std::int64_t* tile_run;
  std::int64_t num_parameters;
  std::int64_t num_runs;  // 0: nothing is scattered, all pointers may be null
};

// The run of an element known to lie in runs [first, last]: the last one to start at or before it.
PECKER_HOST_DEVICE std::int64_t find_run(const ScatterTable& table, std::int64_t element, std::int64_t first,
                                         std::int64_t last) {
  while (first < last) {
    const std::int64_t middle = first + (last - first + 1) / 2;
    if (table.run_flat_offset[middle] <= element) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// value: [numel]. The memory and the stream are as for masked_adamw.
void scatter_cpu(const float* value, std::int64_t numel, const ScatterTable& table, int threads);
void scatter_cuda(const float* value, std::int64_t numel, const ScatterTable& table, std::uintptr_t stream);

}  // namespace pecker
