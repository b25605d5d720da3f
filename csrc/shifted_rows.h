// The rows of a convolution's output gradient, shifted by every tap of the kernel: what makes its weight
// gradient one matrix product with the input as it lies in memory.
#pragma once

#include <cstdint>

namespace pecker {

// Position (y, x) of the input gets, for tap (i, j), the gradient at (y + i - around_height,
// x + j - around_width), zero outside.
struct ShiftedRows {
  const void* grad;  // [batch][grad_height][grad_width][channels]
  std::int64_t element_size;
  std::int64_t batch, grad_height, grad_width, channels;
  const std::int64_t* rows;  // [num_rows] channels
  std::int64_t num_rows;
  std::int64_t kernel_height, kernel_width, around_height, around_width;
  std::int64_t height, width;  // of the input
};

// out: [batch][height][width][kernel_height][kernel_width][num_rows]
void shifted_rows_cpu(const ShiftedRows& shape, void* out, int threads);

}  // namespace pecker
