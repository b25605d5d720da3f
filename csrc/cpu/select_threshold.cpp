#include "../select_threshold.h"

#include <mutex>

#include "isa.h"
#include "parallel.h"

namespace pecker {
namespace {

constexpr std::int64_t kFew = 1 << 18;      // fewer values than this: small histograms, more passes
constexpr std::int64_t kShare = 1 << 19;    // values: below this, more histograms cost too much
constexpr std::int64_t kPiece = 1LL << 31;  // values at a time, so that no 32-bit count overflows

// Calls work(data, n) for what the range [begin, end) of all values, one array after the other, consists of.
template <typename Float, typename Work>
void for_each_part(const std::vector<SelectArray>& arrays, std::int64_t begin, std::int64_t end,
                   const Work& work) {
  std::int64_t start = 0;
  for (const SelectArray& array : arrays) {
    const std::int64_t from = std::max(begin - start, std::int64_t{0});
    const std::int64_t to = std::min(end - start, array.numel);
    if (from < to) work(static_cast<const Float*>(array.data) + from, to - from);
    start += array.numel;
  }
}

template <typename Float>
std::vector<std::int64_t> histogram(const std::vector<SelectArray>& arrays, std::int64_t numel,
                                    const RadixPass& pass, int threads) {
  const SelectKernels& kernels = *selected_kernels().select;
  const auto count = sizeof(Float) == 4 ? kernels.count_float : kernels.count_double;
  const std::size_t bins = std::size_t{1} << pass.bits;
  std::vector<std::int64_t> total(bins);
  std::mutex adding;
  const auto count_share = [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin += kPiece) {
      std::vector<std::uint32_t> counts(kHistograms * bins);
      for_each_part<Float>(arrays, begin, std::min(begin + kPiece, end),
                           [&](const Float* data, std::int64_t n) { count(data, n, pass, counts.data()); });
      const std::lock_guard<std::mutex> lock(adding);
      for (int h = 0; h < kHistograms; ++h) {
        for (std::size_t i = 0; i < bins; ++i) total[i] += counts[h * bins + i];
      }
    }
  };
  parallel_for(numel, threads, count_share, kShare);
  return total;
}

}  // namespace

template <typename Float>
Selected select_threshold_cpu(const std::vector<SelectArray>& arrays, std::int64_t k, int threads) {
  std::int64_t numel = 0;
  for (const SelectArray& array : arrays) numel += array.numel;
  const int bits = numel < kFew ? 8 : 16;
  RadixPass pass{8 * sizeof(Float), bits, 0};
  while (pass.shift > 0) {
    pass.shift -= bits;
    const std::vector<std::int64_t> counts = histogram<Float>(arrays, numel, pass, threads);
    std::size_t digit = counts.size() - 1;
    for (; digit > 0 && counts[digit] < k; --digit) k -= counts[digit];
    pass.prefix = pass.prefix << bits | digit;
  }
  return {pass.prefix, k};
}

template Selected select_threshold_cpu<float>(const std::vector<SelectArray>&, std::int64_t, int);
template Selected select_threshold_cpu<double>(const std::vector<SelectArray>&, std::int64_t, int);

}  // namespace pecker
