#include "../scatter.h"

#include "isa.h"
#include "parallel.h"

namespace pecker {

void scatter_cpu(const float* value, std::int64_t numel, const ScatterTable& table, int threads) {
  if (table.num_runs == 0) return;
  const SpanKernels& kernels = selected_kernels();
  parallel_for(numel, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.scatter[numel >= kStreamAbove](value, begin, end, find_run(table, begin, 0, table.num_runs - 1), table);
    kernels.fence();
  });
}

}  // namespace pecker
