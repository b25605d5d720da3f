#include "../reconcile.h"

#include "isa.h"
#include "parallel.h"

namespace pecker {

void dense_checksums_cpu(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                         int threads) {
  if (table.num_runs == 0) return;
  const ReconcileKernels& kernels = *selected_kernels().reconcile;
  parallel_for(numel, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.checksums(begin, end, find_run(table, begin, 0, table.num_runs - 1), table, base, sums);
  });
}

void reconcile_cpu(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                   std::int64_t base, std::uint64_t* sums, int threads) {
  if (table.num_runs == 0) return;
  const ReconcileKernels& kernels = *selected_kernels().reconcile;
  parallel_for(numel, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.reconcile(value, begin, end, find_run(table, begin, 0, table.num_runs - 1), table, which, base, sums);
  });
}

}  // namespace pecker
