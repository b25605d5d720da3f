// The inner loops of accumulate_saliency_; compiled and chosen like the span kernels.
#pragma once

#include <cstdint>

#include "../accumulate_saliency.h"

namespace pecker {

struct AccumulateKernels {
  // Indexed [total is double][DenseDtype of the gradient], over the elements, or the blocks, [begin, end).
  void (*elements[2][kDenseDtypes])(void* total, const void* grad, SaliencyKind kind, std::int64_t begin,
                                    std::int64_t end);
  void (*blocks[2][kDenseDtypes])(void* total, const void* grad, SaliencyKind kind, const BlockLayout& layout,
                                  std::int64_t begin, std::int64_t end);
};

}  // namespace pecker
