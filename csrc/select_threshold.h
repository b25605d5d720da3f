// The k-th largest of the values of many arrays, exactly: radix selection on integer keys that have the order
// of the floats. One histogram of the keys' digits a pass, the highest digit first; no sort and no copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "host_device.h"

namespace pecker {

struct SelectArray {
  const void* data;  // [numel] float or double
  std::int64_t numel;
};

struct Selected {
  std::uint64_t key;  // of the k-th largest value
  std::int64_t ties;  // how many of the values equal to it belong to the k largest
};

template <typename Float>
using Key = std::conditional_t<sizeof(Float) == 4, std::uint32_t, std::uint64_t>;

template <typename Float>
constexpr Key<Float> kSign = Key<Float>{1} << (8 * sizeof(Float) - 1);
template <typename Float>
constexpr Key<Float> kInfinity = sizeof(Float) == 4 ? Key<Float>{0x7F800000u} : 0x7FF0000000000000u;

// Keys compare as unsigned integers. -0.0 has the key of 0.0, and NaN that of -infinity. Integers alone, so
// that denormals count even where the processor is told to flush them.
template <typename Float>
PECKER_HOST_DEVICE Key<Float> key_of(Float x) {
  Key<Float> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Key<Float> magnitude = bits & ~kSign<Float>;
  bits = magnitude == 0 ? 0 : bits;
  bits = magnitude > kInfinity<Float> ? kSign<Float> | kInfinity<Float> : bits;
  return bits & kSign<Float> ? ~bits : bits | kSign<Float>;
}

template <typename Float>
PECKER_HOST_DEVICE Float value_of(Key<Float> key) {
  const Key<Float> bits = key & kSign<Float> ? key ^ kSign<Float> : ~key;
  Float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One digit of the keys that agree in all higher digits.
struct RadixPass {
  int shift;             // the digit's lowest bit
  int bits;              // at most 16
  std::uint64_t prefix;  // the higher digits
};

// Of a key that is shifted down to the digit's lowest bit.
template <typename Key>
PECKER_HOST_DEVICE bool has_prefix(Key shifted, int bits, Key prefix) {
  return shifted >> bits == prefix;
}

template <typename Key>
PECKER_HOST_DEVICE Key digit_of(Key shifted, int bits) {
  return shifted & ((Key{1} << bits) - 1);
}

// Whether the k-th largest is one of `count` keys, where `above` keys are larger than all of them.
PECKER_HOST_DEVICE bool holds_rank(std::uint64_t above, std::uint64_t count, std::uint64_t k) {
  return above < k && k <= above + count;
}

// Needs 1 <= k <= number of values. The same for every number of threads: only integers are added up.
template <typename Float>
Selected select_threshold_cpu(const std::vector<SelectArray>& arrays, std::int64_t k, int threads);

// Where the GPU leaves what it found: nothing comes back to the host.
struct SelectOutput {
  void* threshold;     // [1] float or double
  std::int64_t* ties;  // [1]
};

// The arrays, the outputs and the workspace are in the current device's memory, the stream is its.
template <typename Float>
void select_threshold_cuda(const std::vector<SelectArray>& arrays, std::int64_t k, const SelectOutput& output,
                           void* workspace, std::uintptr_t stream);
std::int64_t select_workspace_bytes(std::int64_t num_arrays);

}  // namespace pecker
