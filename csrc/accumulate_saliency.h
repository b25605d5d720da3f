// Running saliency: adds one gradient, its magnitude or its square, per weight or summed over blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace pecker {

enum SaliencyKind : std::int32_t { kSignedSum = 0, kAbs = 1, kSquare = 2, kSaliencyKinds = 3 };

PECKER_HOST_DEVICE float magnitude(float x) {
  return fabsf(x);
}

PECKER_HOST_DEVICE double magnitude(double x) {
  return fabs(x);
}

template <typename Float>
PECKER_HOST_DEVICE Float saliency_of(SaliencyKind kind, Float grad) {
  return kind == kSignedSum ? grad : kind == kAbs ? magnitude(grad) : grad * grad;
}

struct SaliencyGrad {
  const void* data;
  DenseDtype dtype;
  SaliencyKind kind;
};

struct SaliencyTotal {
  void* data;
  bool is_double;  // else float
};

// A weight as it lies in memory, [out][repeat][in][unit]: (out, in, taps) is [out][1][in][taps], and
// [out][taps][in][1] in channels-last. It is cut into blocks of block_out x block_in, smaller at the edges.
struct BlockLayout {
  std::int64_t out, repeat, in, unit;
  std::int64_t block_out, block_in;

  std::int64_t rows() const { return (out + block_out - 1) / block_out; }
  std::int64_t columns() const { return (in + block_in - 1) / block_in; }
};

// total: [numel]
void accumulate_saliency_cpu(const SaliencyTotal& total, const SaliencyGrad& grad, std::int64_t numel,
                             int threads);

// total: [rows * columns]. Each block is summed in double by one thread, in an order of its own: the sum is
// the same for every number of threads and every instruction set.
void accumulate_block_saliency_cpu(const SaliencyTotal& total, const SaliencyGrad& grad,
                                   const BlockLayout& layout, int threads);

}  // namespace pecker
