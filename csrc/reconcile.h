// Reconcile: finds dense weights that were written from outside, and brings them and the flat buffer together.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "scatter.h"

namespace pecker {

// What one dense weight adds to the checksum of its parameter, modulo 2^64. The factor is odd and depends on the
// element of the flat buffer: a weight that changes alone always shows, and so do weights that change places.
PECKER_HOST_DEVICE std::uint64_t checksum_term(std::int64_t element, float weight) {
  const std::uint32_t factor = (static_cast<std::uint32_t>(element) + 1u) * 0x9E3779B9u | 1u;
  return static_cast<std::uint64_t>(bits_of(weight)) * factor;
}

template <typename Dense>
PECKER_HOST_DEVICE bool same_bits(Dense a, Dense b) {
  return a.bits == b.bits;
}

PECKER_HOST_DEVICE bool same_bits(float a, float b) {
  return bits_of(a) == bits_of(b);
}

PECKER_HOST_DEVICE bool same_bits(double a, double b) {
  std::uint64_t x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  return x == y;
}

// Which parameters were written from outside, and what is done with them.
struct Reconciliation {
  const bool* written;  // [num_parameters] the flat buffer takes the dense weights over; the other way where false
  bool follow;  // whether dense weights of the others are made those of the flat buffer; else they are left alone
};

// One weight and its dense twin; returns the term of the dense weight as it then is.
template <typename Dense>
PECKER_HOST_DEVICE std::uint64_t reconcile_weight(std::int64_t element, float& value, Dense& dense, bool written,
                                                  bool follow) {
  Dense rounded;
  convert(value, rounded);
  if (!same_bits(rounded, dense)) {
    if (written) {
      value = to_float(dense);
      convert(value, rounded);
    }
    if ((written || follow) && !same_bits(rounded, dense)) dense = rounded;
  }
  return checksum_term(element, to_float(dense));
}

// sums: [num_parameters] zeros; gets the checksum of every parameter's active weights, 0 where it has no dense ones.
// value: [numel]. base: number of the first element. The memory and the stream are as for masked_adamw.
void dense_checksums_cpu(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                         int threads);
void dense_checksums_cuda(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                          std::uintptr_t stream);
void reconcile_cpu(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                   std::int64_t base, std::uint64_t* sums, int threads);
void reconcile_cuda(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                    std::int64_t base, std::uint64_t* sums, std::uintptr_t stream);

}  // namespace pecker
