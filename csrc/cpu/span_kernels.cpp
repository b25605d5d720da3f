// Compiled once per instruction set, each time with PECKER_ISA naming it. Plain loops that the compiler
// vectorises. Nothing here may call an inline function of the standard library: the linker keeps one copy of
// such a function for the whole module, and it might be the one built for the widest instruction set.
#include "span_kernels.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace pecker {
namespace {

// Runs shorter than this are copied in place: the call of memcpy would cost more than the copy.
constexpr std::int64_t kShortRun = 16;
// Runs from this on may be streamed: some whole cache lines, besides a broken one at each end.
constexpr std::int64_t kStreamedRun = 64;

template <bool kHasExpAvg, bool kHasEma, bool kHasSaliency>
void update_arrays(const AdamwConstants c, std::int64_t n, const float* __restrict grad,
                   float* __restrict value, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                   float* __restrict ema, float* __restrict saliency) {
  for (std::int64_t i = 0; i < n; ++i) {
    AdamwState s{value[i], kHasExpAvg ? exp_avg[i] : 0.f, exp_avg_sq[i], kHasEma ? ema[i] : 0.f,
                 kHasSaliency ? saliency[i] : 0.f};
    adamw_update<kHasExpAvg, kHasEma, kHasSaliency>(c, grad[i], s);
    value[i] = s.value;
    exp_avg_sq[i] = s.exp_avg_sq;
    if (kHasExpAvg) exp_avg[i] = s.exp_avg;
    if (kHasEma) ema[i] = s.ema;
    if (kHasSaliency) saliency[i] = s.saliency;
  }
}

template <bool kHasExpAvg, bool kHasEma, bool kHasSaliency>
void update(const AdamwBuffers& b, const AdamwConstants& c, std::int64_t begin, std::int64_t end) {
  update_arrays<kHasExpAvg, kHasEma, kHasSaliency>(
      c, end - begin, b.grad + begin, b.value + begin, kHasExpAvg ? b.exp_avg + begin : nullptr,
      b.exp_avg_sq + begin, kHasEma ? b.ema + begin : nullptr, kHasSaliency ? b.saliency + begin : nullptr);
}

template <bool kStream, typename Dense>
void convert_span(const float* __restrict in, std::int64_t n, Dense* __restrict out) {
  for (std::int64_t i = 0; i < n; ++i) convert(in[i], out[i]);
}

#if defined(__SSE__)
// Copies past the caches: a plain store first reads the line that it overwrites.
void stream_span(const float* __restrict in, std::int64_t n, float* __restrict out) {
#if defined(__AVX512F__)
  constexpr std::int64_t kWide = 16;
#elif defined(__AVX__)
  constexpr std::int64_t kWide = 8;
#else
  constexpr std::int64_t kWide = 4;
#endif
  std::int64_t i = 0;
#pragma GCC unroll 1
  for (; reinterpret_cast<std::uintptr_t>(out + i) % (kWide * sizeof(float)) != 0; ++i) out[i] = in[i];
  for (; i + kWide <= n; i += kWide) {
#if defined(__AVX512F__)
    _mm512_stream_ps(out + i, _mm512_loadu_ps(in + i));
#elif defined(__AVX__)
    _mm256_stream_ps(out + i, _mm256_loadu_ps(in + i));
#else
    _mm_stream_ps(out + i, _mm_loadu_ps(in + i));
#endif
  }
#pragma GCC unroll 1
  for (; i < n; ++i) out[i] = in[i];
}
#endif

template <bool kStream>
void convert_span(const float* __restrict in, std::int64_t n, float* __restrict out) {
#if defined(__SSE__)
  if (kStream && n >= kStreamedRun) return stream_span(in, n, out);
#endif
  if (n >= kShortRun) {
    std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < n; ++i) out[i] = in[i];
}

// Scatters from `run` on for as long as the runs belong to the same parameter and start before `end`; returns
// the first run that does not.
template <bool kStream, typename Dense>
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
      convert_span<kStream>(value + from, to - from, out);
    }
  }
  return run;
}

template <bool kStream>
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
        run = scatter_parameter<kStream, float>(value, begin, end, run, table);
        break;
      case kBfloat16:
        run = scatter_parameter<kStream, Bfloat16>(value, begin, end, run, table);
        break;
      case kFloat16:
        run = scatter_parameter<kStream, Float16>(value, begin, end, run, table);
        break;
      default:
        run = scatter_parameter<kStream, double>(value, begin, end, run, table);
        break;
    }
  }
  const bool cut = run > 0 && table.run_flat_offset[run] > end;  // `end` lies inside the run before
  return cut ? run - 1 : run;
}

// Streamed stores become visible to other threads in their order again.
void fence() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

}  // namespace

const SpanKernels PECKER_ISA::kernels = {
    {{{update<false, false, false>, update<false, false, true>},
      {update<false, true, false>, update<false, true, true>}},
     {{update<true, false, false>, update<true, false, true>},
      {update<true, true, false>, update<true, true, true>}}},
    {scatter<false>, scatter<true>},
    fence,
    &PECKER_ISA::select_kernels,
    &PECKER_ISA::accumulate_kernels,
    &PECKER_ISA::reconcile_kernels,
};

}  // namespace pecker
