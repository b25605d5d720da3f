// The inner loops of accumulate_saliency_; compiled and chosen like the span kernels.
#pragma once

#include <cstdint>

#include "../accumulate_saliency.h"

namespace pecker {

// The sum of a block is kept in this many parts, element i of each run in part i % kParts: the same order of
// additions whatever the instruction set.
constexpr std::int64_t kParts = 16;

// Indexed [total is double][DenseDtype of the gradient]; over elements, or rows of blocks, [begin, end).
struct AccumulateKernels {
  void (*elements[2][kDenseDtypes])(void* total, const void* grad, SaliencyKind kind, std::int64_t begin,
                                    std::int64_t end);
  // parts: [columns][kParts], for the kernel's own use
  void (*blocks[2][kDenseDtypes])(void* total, const void* grad, SaliencyKind kind, const BlockLayout& layout,
                                  std::int64_t begin, std::int64_t end, double* parts);
};

}  // namespace pecker
