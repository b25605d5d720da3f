// What the CUDA ops share: the launch shape and error reporting.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pecker {

constexpr int kThreads = 256;
constexpr int kPack = 4;  // elements per thread: 16 bytes of each buffer
constexpr std::int64_t kTile = std::int64_t{kThreads} * kPack;  // elements per thread block
constexpr std::int64_t kMaxTiles = 0x7FFFFFFF;  // the first dimension of a grid

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

inline unsigned tiles(std::int64_t numel) {
  if (numel > kMaxTiles * kTile) throw std::invalid_argument("expected at most 2^31 - 1 tiles of 1024 elements");
  return static_cast<unsigned>((numel + kTile - 1) / kTile);
}

}  // namespace pecker
