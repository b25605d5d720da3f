// Splits a flat range among threads. Shares touch separate elements: results do not depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <future>
#include <vector>

namespace pecker {

constexpr std::int64_t kMinShare =
    1 << 16;  // elements; below this, starting a thread costs more than it saves
constexpr std::int64_t kShareAlignment = 16;  // floats in a cache line, so that no line has two writers

// Calls work(begin, end) for shares of [0, n); the calling thread takes one of them. Threads are made per
// call: their start is small against a share, and none is left behind to trouble a fork. std::async's default
// policy runs a share in the caller when the system refuses another thread.
template <typename Work>
void parallel_for(std::int64_t n, int threads, const Work& work, std::int64_t min_share = kMinShare,
                  std::int64_t alignment = kShareAlignment) {
  const std::int64_t shares = std::clamp<std::int64_t>(n / min_share, 1, threads);
  const std::int64_t even = (n + shares - 1) / shares;
  const std::int64_t share = (even + alignment - 1) / alignment * alignment;
  std::vector<std::future<void>> helpers;
  for (std::int64_t begin = share; begin < n; begin += share) {
    helpers.push_back(std::async([&work, begin, end = std::min(begin + share, n)] { work(begin, end); }));
  }
  work(std::int64_t{0}, std::min(share, n));
  for (std::future<void>& helper : helpers) helper.get();
}

}  // namespace pecker
