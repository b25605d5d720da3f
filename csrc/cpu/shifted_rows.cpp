#include "../shifted_rows.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace pecker {
namespace {

// The picked channels of one line of the gradient, with room around it: [around + grad_width + around][rows].
template <typename Element>
class PickedLine {
 public:
  explicit PickedLine(const ShiftedRows& s)
      : picked_((s.grad_width + 2 * s.around_width) * s.num_rows), source_(-1) {}

  // Line `line` of all samples together.
  const Element* pick(const ShiftedRows& s, std::int64_t line) {
    if (line != source_) {
      const Element* in = static_cast<const Element*>(s.grad) + line * s.grad_width * s.channels;
      Element* out = picked_.data() + s.around_width * s.num_rows;
      for (std::int64_t x = 0; x < s.grad_width; ++x, in += s.channels) {
        for (std::int64_t r = 0; r < s.num_rows; ++r) *out++ = in[s.rows[r]];
      }
      source_ = line;
    }
    return picked_.data();
  }

 private:
  std::vector<Element> picked_;
  std::int64_t source_;
};

// Lines [begin, end) of the input, of all samples together. Consecutive lines share all but one line of the
// gradient, which stay picked in a ring.
template <typename Element>
void shift_lines(const ShiftedRows& s, Element* out, std::int64_t begin, std::int64_t end) {
  const std::int64_t tap_row = s.kernel_width * s.num_rows, position = s.kernel_height * tap_row;
  std::vector<PickedLine<Element>> ring(static_cast<std::size_t>(s.kernel_height), PickedLine<Element>(s));
  const std::vector<Element> zeros((s.width + s.kernel_width) * s.num_rows);
  out += begin * s.width * position;
  for (std::int64_t line = begin; line < end; ++line, out += s.width * position) {
    const std::int64_t sample = line / s.height, y = line % s.height;
    for (std::int64_t i = 0; i < s.kernel_height; ++i) {
      const std::int64_t source = y + i - s.around_height;
      const bool inside = 0 <= source && source < s.grad_height;
      const Element* in =
          inside ? ring[(y + i) % s.kernel_height].pick(s, sample * s.grad_height + source) : zeros.data();
      Element* to = out + i * tap_row;
      for (std::int64_t x = 0; x < s.width; ++x, to += position, in += s.num_rows) {
        std::memcpy(to, in, tap_row * sizeof(Element));
      }
    }
  }
}

template <typename Element>
void shift(const ShiftedRows& s, void* out, int threads) {
  const std::int64_t line = s.width * s.kernel_height * s.kernel_width * s.num_rows;
  const std::int64_t lines_at_least = line > 0 ? kMinShare / line + 1 : 1;
  parallel_for(
      s.batch * s.height, threads,
      [&](std::int64_t begin, std::int64_t end) {
        shift_lines(s, static_cast<Element*>(out), begin, end);
      },
      lines_at_least, 1);
}

}  // namespace

void shifted_rows_cpu(const ShiftedRows& s, void* out, int threads) {
  switch (s.element_size) {
    case 2:
      return shift<std::uint16_t>(s, out, threads);
    case 4:
      return shift<std::uint32_t>(s, out, threads);
    default:
      return shift<std::uint64_t>(s, out, threads);
  }
}

}  // namespace pecker
