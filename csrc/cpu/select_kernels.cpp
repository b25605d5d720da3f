// Compiled once per instruction set; see span_kernels.cpp for what that forbids.
#include "../select_threshold.h"
#include "span_kernels.h"

namespace pecker {
namespace {

constexpr std::int64_t kBlock = 64;  // keys at a time: after the first pass most blocks hold none that counts

// Moves the keys with the prefix to the front and returns their number. No branch: they may be half of all.
template <typename Key>
PECKER_HOST_DEVICE std::int64_t keep_matches(Key* keys, std::int64_t n, const RadixPass& pass) {
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const Key key = keys[i];
    keys[kept] = key;
    kept += has_prefix(key, pass.bits, static_cast<Key>(pass.prefix));
  }
  return kept;
}

template <typename Key>
PECKER_HOST_DEVICE void count_digits(const Key* keys, std::int64_t n, int bits, std::uint32_t* counts) {
  static_assert(kHistograms == 4, "the loop below is unrolled by hand");
  const std::int64_t bins = std::int64_t{1} << bits;
  std::int64_t i = 0;
  for (; i + kHistograms <= n; i += kHistograms) {
    ++counts[digit_of(keys[i], bits)];
    ++counts[bins + digit_of(keys[i + 1], bits)];
    ++counts[2 * bins + digit_of(keys[i + 2], bits)];
    ++counts[3 * bins + digit_of(keys[i + 3], bits)];
  }
  for (; i < n; ++i) ++counts[digit_of(keys[i], bits)];
}

// Always inlined, so that n is a constant for all blocks but the last.
template <typename Float>
PECKER_HOST_DEVICE void count_block(const Float* values, std::int64_t n, const RadixPass& pass,
                                    std::uint32_t* counts) {
  Key<Float> keys[kBlock], matches = 0;
  const Key<Float> prefix = static_cast<Key<Float>>(pass.prefix);
  for (std::int64_t i = 0; i < n; ++i) {
    keys[i] = key_of(values[i]) >> pass.shift;
    matches += has_prefix(keys[i], pass.bits, prefix);
  }
  if (matches == 0) return;
  const bool all = matches == static_cast<Key<Float>>(n);
  count_digits(keys, all ? n : keep_matches(keys, n, pass), pass.bits, counts);
}

template <typename Float>
void count(const void* data, std::int64_t n, const RadixPass& radix_pass, std::uint32_t* counts) {
  const RadixPass pass = radix_pass;  // a copy, which the counts cannot overwrite
  const Float* values = static_cast<const Float*>(data);
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) count_block(values + i, kBlock, pass, counts);
  count_block(values + i, n - i, pass, counts);
}

}  // namespace

const SelectKernels PECKER_ISA::select_kernels = {count<float>, count<double>};

}  // namespace pecker
