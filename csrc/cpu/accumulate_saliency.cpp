#include "../accumulate_saliency.h"

#include "isa.h"
#include "parallel.h"

namespace pecker {

void accumulate_saliency_cpu(const SaliencyTotal& total, const SaliencyGrad& grad, std::int64_t numel,
                             int threads) {
  const auto add = selected_kernels().accumulate->elements[total.is_double][grad.dtype];
  parallel_for(numel, threads, [&](std::int64_t begin, std::int64_t end) {
    add(total.data, grad.data, grad.kind, begin, end);
  });
}

void accumulate_block_saliency_cpu(const SaliencyTotal& total, const SaliencyGrad& grad,
                                   const BlockLayout& layout, int threads) {
  const auto add = selected_kernels().accumulate->blocks[total.is_double][grad.dtype];
  const std::int64_t rows = layout.rows();
  const std::int64_t row_numel = layout.block_out * layout.repeat * layout.in * layout.unit;
  const std::int64_t min_share = kMinShare / std::clamp<std::int64_t>(row_numel, 1, kMinShare);
  parallel_for(
      rows, threads,
      [&](std::int64_t begin, std::int64_t end) {
        std::vector<double> parts(layout.columns() * kParts);
        add(total.data, grad.data, grad.kind, layout, begin, end, parts.data());
      },
      min_share, 1);
}

}  // namespace pecker
