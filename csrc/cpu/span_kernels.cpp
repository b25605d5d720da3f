// Compiled once per instruction set, each time with PECKER_ISA naming it. Plain loops that the compiler
// vectorises. Nothing here may call an inline function of the standard library: the linker keeps one copy of
// such a function for the whole module, and it might be the one built for the widest instruction set.
#include "span_kernels.h"

namespace pecker {
namespace {

// Runs shorter than this are copied in place: the call of memcpy would cost more than the copy.
constexpr std::int64_t kShortRun = 16;

template <bool kHasExpAvg, bool kHasEma>
void update_arrays(const AdamwConstants c, std::int64_t n, const float* __restrict grad,
                   float* __restrict value, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                   float* __restrict ema) {
  for (std::int64_t i = 0; i < n; ++i) {
    float w = value[i], v = exp_avg_sq[i];
    float m = kHasExpAvg ? exp_avg[i] : 0.f, average = kHasEma ? ema[i] : 0.f;
    adamw_update<kHasExpAvg, kHasEma>(c, grad[i], w, m, v, average);
    value[i] = w;
    exp_avg_sq[i] = v;
    if (kHasExpAvg) exp_avg[i] = m;
    if (kHasEma) ema[i] = average;
  }
}

template <bool kHasExpAvg, bool kHasEma>
void update(const AdamwBuffers& b, const AdamwConstants& c, std::int64_t begin, std::int64_t end) {
  update_arrays<kHasExpAvg, kHasEma>(c, end - begin, b.grad + begin, b.value + begin,
                                     kHasExpAvg ? b.exp_avg + begin : nullptr, b.exp_avg_sq + begin,
                                     kHasEma ? b.ema + begin : nullptr);
}

template <typename Dense>
void convert_span(const float* __restrict in, std::int64_t n, Dense* __restrict out) {
  for (std::int64_t i = 0; i < n; ++i) convert(in[i], out[i]);
}

void convert_span(const float* __restrict in, std::int64_t n, float* __restrict out) {
  if (n >= kShortRun) {
    std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < n; ++i) out[i] = in[i];
}

// Scatters from `run` on for as long as the runs belong to the same parameter and start before `end`; returns
// the first run that does not.
template <typename Dense>
std::int64_t scatter_parameter(const float* value, std::int64_t begin, std::int64_t end, std::int64_t run,
                               const ScatterTable& table) {
  const std::int32_t parameter = table.run_parameter[run];
  Dense* dense = reinterpret_cast<Dense*>(table.dense_pointers[parameter]);
  for (; run < table.num_runs && table.run_parameter[run] == parameter; ++run) {
    const std::int64_t start = table.run_flat_offset[run], stop = table.run_flat_offset[run + 1];
    if (start >= end) break;
    const std::int64_t from = start > begin ? start : begin, to = stop < end ? stop : end;
    Dense* out = dense + table.run_dense_offset[run] + (from - start);
    if (to - from == 1) {
      convert(value[from], *out);  // element masks: no loop around a single weight
    } else {
      convert_span(value + from, to - from, out);
    }
  }
  return run;
}

std::int64_t scatter(const float* value, std::int64_t begin, std::int64_t end, std::int64_t run,
                     const ScatterTable& table) {
  while (run < table.num_runs && table.run_flat_offset[run] < end) {
    const std::int32_t parameter = table.run_parameter[run];
    if (table.dense_pointers[parameter] == 0) {
      ++run;
      continue;
    }
    switch (table.dense_dtypes[parameter]) {
      case kFloat32:
        run = scatter_parameter<float>(value, begin, end, run, table);
        break;
      case kBfloat16:
        run = scatter_parameter<Bfloat16>(value, begin, end, run, table);
        break;
      case kFloat16:
        run = scatter_parameter<Float16>(value, begin, end, run, table);
        break;
      default:
        run = scatter_parameter<double>(value, begin, end, run, table);
        break;
    }
  }
  const bool cut = run > 0 && table.run_flat_offset[run] > end;  // `end` lies inside the run before
  return cut ? run - 1 : run;
}

}  // namespace

const SpanKernels PECKER_ISA::kernels = {
    {{update<false, false>, update<false, true>}, {update<true, false>, update<true, true>}},
    scatter,
};

}  // namespace pecker
