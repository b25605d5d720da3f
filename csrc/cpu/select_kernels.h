// The inner loop of select_threshold; compiled and chosen like the span kernels.
#pragma once

#include <cstdint>

#include "../select_threshold.h"

namespace pecker {

// Counts are kept in this many histograms side by side, so that equal neighbours do not wait for one another.
constexpr int kHistograms = 4;

struct SelectKernels {
  // Adds the digits of data[0, n) to counts[kHistograms][1 << bits].
  void (*count_float)(const void* data, std::int64_t n, const RadixPass& pass, std::uint32_t* counts);
  void (*count_double)(const void* data, std::int64_t n, const RadixPass& pass, std::uint32_t* counts);
};

}  // namespace pecker
