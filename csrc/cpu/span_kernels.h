// The inner loops of the CPU ops, over one span [begin, end) of the flat buffer. All *_kernels.cpp are
// compiled once per instruction set (see CMakeLists.txt); isa.h chooses among the results at run time.
#pragma once

#include <cstdint>

#include "../masked_adamw.h"
#include "../scatter.h"
#include "accumulate_kernels.h"
#include "reconcile_kernels.h"
#include "select_kernels.h"

namespace pecker {

// Active weights above which the dense ones are written past the caches, which could not keep them anyway.
constexpr std::int64_t kStreamAbove = 4 << 20;

struct SpanKernels {
  // AdamW, indexed [has exp_avg][has ema][has saliency].
  void (*update[2][2][2])(const AdamwBuffers& buffers, const AdamwConstants& constants, std::int64_t begin,
                          std::int64_t end);
  // Scatters the span, whose first element lies in `run`; returns the run of element `end`.
  // Indexed [past the caches]: for more than they hold, when nobody reads the weights soon; then fence() too.
  std::int64_t (*scatter[2])(const float* value, std::int64_t begin, std::int64_t end, std::int64_t run,
                             const ScatterTable& table);
  void (*fence)();
  const SelectKernels* select;
  const AccumulateKernels* accumulate;
  const ReconcileKernels* reconcile;
};

namespace avx512 {
extern const SpanKernels kernels;
extern const SelectKernels select_kernels;
extern const AccumulateKernels accumulate_kernels;
extern const ReconcileKernels reconcile_kernels;
}
namespace avx2 {
extern const SpanKernels kernels;
extern const SelectKernels select_kernels;
extern const AccumulateKernels accumulate_kernels;
extern const ReconcileKernels reconcile_kernels;
}
namespace scalar {
extern const SpanKernels kernels;
extern const SelectKernels select_kernels;
extern const AccumulateKernels accumulate_kernels;
extern const ReconcileKernels reconcile_kernels;
}

}  // namespace pecker
