#include "../masked_adamw.h"

#include "isa.h"
#include "parallel.h"

namespace pecker {

namespace {
// Elements: the new values (2 KiB) are still in L1 when they are scattered, and the writes past the caches are
// spread among the reads of the next chunk.
constexpr std::int64_t kChunk = 512;
}

void masked_adamw_cpu(const AdamwBuffers& buffers, const AdamwConstants& constants, const ScatterTable& table,
                      int threads) {
  const SpanKernels& kernels = selected_kernels();
  const auto update =
      kernels.update[buffers.exp_avg != nullptr][buffers.ema != nullptr][buffers.saliency != nullptr];
  const bool streams = buffers.numel >= kStreamAbove;
  parallel_for(buffers.numel, threads, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t run = find_run(table, begin, 0, table.num_runs - 1);
    for (std::int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const std::int64_t stop = std::min(chunk + kChunk, end);
      update(buffers, constants, chunk, stop);
      if (table.num_runs > 0) run = kernels.scatter[streams](buffers.value, chunk, stop, run, table);
    }
    kernels.fence();
  });
}

}  // namespace pecker
