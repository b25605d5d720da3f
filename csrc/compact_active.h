// From values and a threshold to the sorted positions of the active ones, over many arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "host_device.h"
#include "select_threshold.h"

namespace pecker {

struct CompactInput {
  const void* threshold;     // [1] float or double, like the arrays
  const std::int64_t* ties;  // [1]
};

// The active values of array a are at positions index[offsets[a]], ..., index[offsets[a + 1] - 1] of it.
struct CompactOutput {
  std::int64_t* index;  // [capacity] the first active ones, -1 where there are fewer
  std::int64_t capacity;
  std::int64_t* offsets;  // [num_arrays + 1]
};

// Of `equal` values equal to the threshold, `equal_before` others before them: how many are active.
PECKER_HOST_DEVICE std::int64_t active_ties(std::int64_t equal, std::int64_t equal_before,
                                            std::int64_t ties) {
  const std::int64_t left = ties > equal_before ? ties - equal_before : 0;
  return equal < left ? equal : left;
}

// Everything is in the current device's memory but the list of arrays; the stream is the device's.
template <typename Float>
void compact_active_cuda(const std::vector<SelectArray>& arrays, const CompactInput& input,
                         const CompactOutput& output, void* workspace, std::uintptr_t stream);
template <typename Float>
std::int64_t compact_workspace_bytes(const std::vector<SelectArray>& arrays);

}  // namespace pecker
