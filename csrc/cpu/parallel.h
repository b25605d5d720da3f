// Splits a flat range among threads. Shares touch separate elements: results do not depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace pecker {

constexpr std::int64_t kMinShare = 1 << 16;  // elements; below this, waking a thread costs more than it saves
constexpr std::int64_t kShareAlignment = 16;  // floats in a cache line, so that no line has two writers

// Runs share(0) to share(count - 1) at the same time, and rethrows the first exception of one.
void run_shares(std::int64_t count, const std::function<void(std::int64_t)>& share);

// Calls work(begin, end) for shares of [0, n).
template <typename Work>
void parallel_for(std::int64_t n, int threads, const Work& work, std::int64_t min_share = kMinShare,
                  std::int64_t alignment = kShareAlignment) {
  const std::int64_t shares = std::clamp<std::int64_t>(n / min_share, 1, threads);
  const std::int64_t even = (n + shares - 1) / shares;
  const std::int64_t share = (even + alignment - 1) / alignment * alignment;
  if (shares == 1 || share >= n) return work(std::int64_t{0}, n);
  run_shares((n + share - 1) / share,
             [&](std::int64_t i) { work(i * share, std::min((i + 1) * share, n)); });
}

}  // namespace pecker
