// Compiled once per instruction set; see span_kernels.cpp for what that forbids.
#include "span_kernels.h"

namespace pecker {
namespace {

template <typename Total, typename Grad>
PECKER_HOST_DEVICE Total as(Grad grad) {
  return to_float(grad);
}

template <typename Total>
PECKER_HOST_DEVICE Total as(double grad) {
  return static_cast<Total>(grad);
}

template <typename Total, SaliencyKind kKind, typename Grad>
void add_elements(Total* __restrict total, const Grad* __restrict grad, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) total[i] += saliency_of(kKind, as<Total>(grad[i]));
}

template <typename Total, typename Grad>
void elements(void* total, const void* grad, SaliencyKind kind, std::int64_t begin, std::int64_t end) {
  const auto add = kind == kSignedSum ? add_elements<Total, kSignedSum, Grad>
                   : kind == kAbs     ? add_elements<Total, kAbs, Grad>
                                      : add_elements<Total, kSquare, Grad>;
  add(static_cast<Total*>(total) + begin, static_cast<const Grad*>(grad) + begin, end - begin);
}

template <typename Total, SaliencyKind kKind, typename Grad>
PECKER_HOST_DEVICE void add_run(const Grad* grad, std::int64_t n, double* parts) {
  double sums[kParts];
  for (int j = 0; j < kParts; ++j) sums[j] = parts[j];
  for (; n >= kParts; n -= kParts, grad += kParts) {
    for (int j = 0; j < kParts; ++j) sums[j] += saliency_of(kKind, as<Total>(grad[j]));
  }
  for (int j = 0; j < kParts; ++j) parts[j] = sums[j];
  for (std::int64_t j = 0; j < n; ++j) parts[j] += saliency_of(kKind, as<Total>(grad[j]));
}

// All blocks of one row together, so that memory is read in order.
template <typename Total, SaliencyKind kKind, typename Grad>
void add_block_row(Total* total, const Grad* grad, const BlockLayout& layout, std::int64_t row,
                   double* parts) {
  const std::int64_t begin = row * layout.block_out, columns = layout.columns();
  const std::int64_t end = begin + layout.block_out < layout.out ? begin + layout.block_out : layout.out;
  for (std::int64_t j = 0; j < columns * kParts; ++j) parts[j] = 0;
  for (std::int64_t run = begin * layout.repeat; run < end * layout.repeat; ++run) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t from = c * layout.block_in;
      const std::int64_t width = layout.in - from < layout.block_in ? layout.in - from : layout.block_in;
      const Grad* data = grad + (run * layout.in + from) * layout.unit;
      add_run<Total, kKind>(data, width * layout.unit, parts + c * kParts);
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int j = 0; j < kParts; ++j) sum += parts[c * kParts + j];
    total[row * columns + c] = static_cast<Total>(total[row * columns + c] + sum);
  }
}

template <typename Total, typename Grad>
void blocks(void* total, const void* grad, SaliencyKind kind, const BlockLayout& layout, std::int64_t begin,
            std::int64_t end, double* parts) {
  Total* to = static_cast<Total*>(total);
  const Grad* from = static_cast<const Grad*>(grad);
  const auto add_row = kind == kSignedSum ? add_block_row<Total, kSignedSum, Grad>
                       : kind == kAbs     ? add_block_row<Total, kAbs, Grad>
                                          : add_block_row<Total, kSquare, Grad>;
  for (std::int64_t row = begin; row < end; ++row) add_row(to, from, layout, row, parts);
}

}  // namespace

const AccumulateKernels PECKER_ISA::accumulate_kernels = {
    {{elements<float, float>, elements<float, Bfloat16>, elements<float, Float16>, elements<float, double>},
     {elements<double, float>, elements<double, Bfloat16>, elements<double, Float16>,
      elements<double, double>}},
    {{blocks<float, float>, blocks<float, Bfloat16>, blocks<float, Float16>, blocks<float, double>},
     {blocks<double, float>, blocks<double, Bfloat16>, blocks<double, Float16>, blocks<double, double>}},
};

}  // namespace pecker
