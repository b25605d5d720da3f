// The CUDA sources of select_threshold and compact_active as a library for ctypes, run by cuda_runtime.h.
#include <cuda_runtime.h>

#include "../../../csrc/compact_active.h"

namespace {

std::vector<pecker::SelectArray> arrays_of(const void* const* data, const std::int64_t* numels, int count) {
  std::vector<pecker::SelectArray> arrays;
  for (int i = 0; i < count; ++i) arrays.push_back({data[i], numels[i]});
  return arrays;
}

}  // namespace

extern "C" {

// Workspaces come as GPU memory does: with anything in them.
void select_threshold(const void* const* data, const std::int64_t* numels, int count, bool is_double,
                      std::int64_t k, unsigned seed, void* threshold, std::int64_t* ties) {
  on_host::seed = seed;
  std::vector<std::uint64_t> workspace(static_cast<std::size_t>(pecker::select_workspace_bytes(count)) / 8,
                                       0x5555555555555555u);
  const auto select =
      is_double ? pecker::select_threshold_cuda<double> : pecker::select_threshold_cuda<float>;
  select(arrays_of(data, numels, count), k, {threshold, ties}, workspace.data(), 0);
}

void compact_active(const void* const* data, const std::int64_t* numels, int count, bool is_double,
                    const void* threshold, const std::int64_t* ties, unsigned seed, std::int64_t* index,
                    std::int64_t capacity, std::int64_t* offsets) {
  on_host::seed = seed;
  const auto arrays = arrays_of(data, numels, count);
  const std::int64_t bytes = is_double ? pecker::compact_workspace_bytes<double>(arrays)
                                       : pecker::compact_workspace_bytes<float>(arrays);
  std::vector<std::uint64_t> workspace(static_cast<std::size_t>(bytes) / 8, 0x5555555555555555u);
  const auto compact = is_double ? pecker::compact_active_cuda<double> : pecker::compact_active_cuda<float>;
  compact(arrays, {threshold, ties}, {index, capacity, offsets}, workspace.data(), 0);
}
}
