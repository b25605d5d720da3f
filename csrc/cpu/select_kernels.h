// The inner loop of select_threshold; compiled and chosen like the span kernels.
#pragma once

#include <cstdint>

namespace pecker {

// One digit of the keys that agree in all higher digits.
struct RadixPass {
  int shift;             // the digit's lowest bit
  int bits;              // at most 16
  std::uint64_t prefix;  // the higher digits
};

// Counts are kept in this many histograms side by side, so that equal neighbours do not wait for one another.
constexpr int kHistograms = 4;

struct SelectKernels {
  // Adds the digits of data[0, n) to counts[kHistograms][1 << bits].
  void (*count_float)(const void* data, std::int64_t n, const RadixPass& pass, std::uint32_t* counts);
  void (*count_double)(const void* data, std::int64_t n, const RadixPass& pass, std::uint32_t* counts);
};

}  // namespace pecker
