// Compiled once per instruction set; see span_kernels.cpp for what that forbids.
#include "span_kernels.h"

namespace pecker {
namespace {

// A sum is kept in this many parts, element i in part i % kParts of its run, whatever the instruction set.
constexpr std::int64_t kParts = 16;

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
  Total* to = static_cast<Total*>(total) + begin;
  const Grad* from = static_cast<const Grad*>(grad) + begin;
  switch (kind) {
    case kSignedSum:
      return add_elements<Total, kSignedSum>(to, from, end - begin);
    case kAbs:
      return add_elements<Total, kAbs>(to, from, end - begin);
    default:
      return add_elements<Total, kSquare>(to, from, end - begin);
  }
}

template <typename Total, SaliencyKind kKind, typename Grad>
PECKER_HOST_DEVICE void add_run(const Grad* grad, std::int64_t n, double* parts) {
  for (; n >= kParts; n -= kParts, grad += kParts) {
    for (int j = 0; j < kParts; ++j) parts[j] += saliency_of(kKind, as<Total>(grad[j]));
  }
  for (std::int64_t j = 0; j < n; ++j) parts[j] += saliency_of(kKind, as<Total>(grad[j]));
}

template <typename Total, SaliencyKind kKind, typename Grad>
double block_sum(const Grad* grad, const BlockLayout& layout, std::int64_t block) {
  const std::int64_t row = block / layout.columns() * layout.block_out;
  const std::int64_t column = block % layout.columns() * layout.block_in;
  const std::int64_t height = layout.out - row < layout.block_out ? layout.out - row : layout.block_out;
  const std::int64_t width = layout.in - column < layout.block_in ? layout.in - column : layout.block_in;
  double parts[kParts] = {};
  for (std::int64_t run = row * layout.repeat; run < (row + height) * layout.repeat; ++run) {
    add_run<Total, kKind>(grad + (run * layout.in + column) * layout.unit, width * layout.unit, parts);
  }
  double sum = 0;
  for (int j = 0; j < kParts; ++j) sum += parts[j];
  return sum;
}

template <typename Total, SaliencyKind kKind, typename Grad>
void add_blocks(Total* total, const Grad* grad, const BlockLayout& layout, std::int64_t begin,
                std::int64_t end) {
  for (std::int64_t block = begin; block < end; ++block) {
    total[block] = static_cast<Total>(total[block] + block_sum<Total, kKind>(grad, layout, block));
  }
}

template <typename Total, typename Grad>
void blocks(void* total, const void* grad, SaliencyKind kind, const BlockLayout& layout, std::int64_t begin,
            std::int64_t end) {
  Total* to = static_cast<Total*>(total);
  const Grad* from = static_cast<const Grad*>(grad);
  switch (kind) {
    case kSignedSum:
      return add_blocks<Total, kSignedSum>(to, from, layout, begin, end);
    case kAbs:
      return add_blocks<Total, kAbs>(to, from, layout, begin, end);
    default:
      return add_blocks<Total, kSquare>(to, from, layout, begin, end);
  }
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
