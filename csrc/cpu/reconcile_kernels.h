// The inner loops of reconcile; compiled and chosen like the span kernels.
#pragma once

#include <cstdint>

#include "../reconcile.h"

namespace pecker {

// Over the elements [begin, end) of the flat buffer, the first of which lies in `run`; adds to `sums` atomically.
struct ReconcileKernels {
  void (*checksums)(std::int64_t begin, std::int64_t end, std::int64_t run, const ScatterTable& table,
                    std::int64_t base, std::uint64_t* sums);
  void (*reconcile)(float* value, std::int64_t begin, std::int64_t end, std::int64_t run, const ScatterTable& table,
                    const Reconciliation& which, std::int64_t base, std::uint64_t* sums);
};

}  // namespace pecker
