// The dtypes of dense weights; conversion of a float to each and back: to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pecker {

enum DenseDtype : std::int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kDenseDtypes = 4 };

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

PECKER_HOST_DEVICE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

PECKER_HOST_DEVICE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

PECKER_HOST_DEVICE void convert(float x, float& out) {
  out = x;
}

PECKER_HOST_DEVICE void convert(float x, double& out) {
  out = x;
}

PECKER_HOST_DEVICE void convert(float x, Bfloat16& out) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

// Free of branches, so that it vectorises: the float addition of a power of two, chosen from the exponent,
// rounds the significand to half's 10 bits (fewer for denormals), and the scaling turns what is too large
// into infinity. Method: M. Dukhan's FP16 library, also used by torch.
PECKER_HOST_DEVICE void convert(float x, Float16& out) {
  const std::uint32_t sign = bits_of(x) & 0x80000000u;
  const std::uint32_t magnitude = bits_of(x) ^ sign;
  const float scaled = float_of(magnitude) * 0x1p112f * 0x1p-110f;
  const std::uint32_t exponent = magnitude & 0x7F800000u;
  const std::uint32_t rounding = (exponent < 0x38800000u ? 0x38800000u : exponent) + 0x07800000u;
  const std::uint32_t sum = bits_of(float_of(rounding) + scaled);
  const std::uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  out.bits = static_cast<std::uint16_t>((sign >> 16) | (magnitude > 0x7F800000u ? 0x7E00u : half));
}

PECKER_HOST_DEVICE float to_float(float x) {
  return x;
}

PECKER_HOST_DEVICE float to_float(double x) {
  return static_cast<float>(x);
}

PECKER_HOST_DEVICE float to_float(Bfloat16 x) {
  return float_of(std::uint32_t{x.bits} << 16);
}

// Free of branches like the way there: the exponent of a normal half is shifted into place and rebased by a
// multiplication, which also keeps infinity and NaN; a denormal half is the fraction of a float near 0.5.
PECKER_HOST_DEVICE float to_float(Float16 x) {
  const std::uint32_t sign = (std::uint32_t{x.bits} & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7FFFu;
  const float normal = float_of((magnitude << 13) + 0x70000000u) * 0x1p-112f;
  const float denormal = float_of(magnitude | 0x3F000000u) - 0.5f;
  return float_of(sign | bits_of(magnitude < 0x0400u ? denormal : normal));
}

}  // namespace pecker
