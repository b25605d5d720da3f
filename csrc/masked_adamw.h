// AdamW on the flat buffers of the active weights: the maths of one element, once for the CPU and the GPU.
//
// Every multiplication and addition is rounded on its own (built without contraction to FMA), in the order of
// the plain-torch reference, so that all builds of this header give the reference's bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "accumulate_saliency.h"
#include "host_device.h"
#include "scatter.h"

namespace pecker {

struct AdamwSettings {
  std::int64_t step;  // 1 for the first update
  double lr, beta1, beta2, eps, weight_decay;
  double clip_value;  // infinity: gradients are not clipped
  double ema_decay;
  SaliencyKind saliency_kind;
};

// Aligned so that the GPU reads them with three loads.
struct alignas(16) AdamwConstants {
  float decay;  // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;   // lr / (1 - beta1^step)
  float bias2_sqrt;  // sqrt(1 - beta2^step)
  float eps;
  float clip_value;
  float one_minus_ema_decay;
  SaliencyKind saliency_kind;
};

struct AdamwBuffers {
  float* value;       // [numel]
  const float* grad;  // [numel]
  float* exp_avg;     // [numel], or null: no first moment (beta1 = 0)
  float* exp_avg_sq;  // [numel]
  float* ema;         // [numel], or null: no moving average of the values
  float* saliency;    // [numel], or null: the gradients are not added up
  std::int64_t numel;
};

// In double: 1 - beta2^step loses all its digits in float when beta2 is near 1. The GPU's pow may differ from the
// CPU's by 2 ulp of a double, which the rounding to float all but always hides; where not, it is 1 ulp of a float.
PECKER_HOST_DEVICE AdamwConstants adamw_constants(const AdamwSettings& s) {
  const double step = static_cast<double>(s.step);
  AdamwConstants c;
  c.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
  c.one_minus_beta1 = static_cast<float>(1.0 - s.beta1);
  c.beta2 = static_cast<float>(s.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - s.beta2);
  c.step_size = static_cast<float>(s.lr / (1.0 - pow(s.beta1, step)));
  c.bias2_sqrt = static_cast<float>(sqrt(1.0 - pow(s.beta2, step)));
  c.eps = static_cast<float>(s.eps);
  c.clip_value = static_cast<float>(s.clip_value);
  c.one_minus_ema_decay = static_cast<float>(1.0 - s.ema_decay);
  c.saliency_kind = s.saliency_kind;
  return c;
}

// Both comparisons are false for NaN, which therefore stays NaN.
PECKER_HOST_DEVICE float clamp(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// What is kept for one weight; members without a buffer are dummies.
struct AdamwState {
  float value, exp_avg, exp_avg_sq, ema, saliency;
};

// The saliency is that of the gradient as it comes, before it is clipped.
template <bool kHasExpAvg, bool kHasEma, bool kHasSaliency>
PECKER_HOST_DEVICE void adamw_update(const AdamwConstants& c, float g, AdamwState& s) {
  if (kHasSaliency) s.saliency = s.saliency + saliency_of(c.saliency_kind, g);
  g = clamp(g, c.clip_value);
  s.value = s.value * c.decay;
  s.exp_avg = kHasExpAvg ? s.exp_avg + c.one_minus_beta1 * (g - s.exp_avg) : g;
  s.exp_avg_sq = c.beta2 * s.exp_avg_sq + c.one_minus_beta2 * (g * g);
  s.value = s.value - c.step_size * (s.exp_avg / (sqrtf(s.exp_avg_sq) / c.bias2_sqrt + c.eps));
  if (kHasEma) s.ema = s.ema + c.one_minus_ema_decay * (s.value - s.ema);
}

// What a captured CUDA graph must find changed at every replay, in device memory; null: the number in AdamwSettings.
struct AdamwDeviceNumbers {
  const float* step;
  const void* lr;  // float, or double
  bool lr_is_double;
  AdamwConstants* constants;  // scratch; null where both are numbers
};

// The CPU's buffers and table are in host memory, the GPU's in that of the current device; the stream is its.
void masked_adamw_cpu(const AdamwBuffers& buffers, const AdamwConstants& constants, const ScatterTable& table,
                      int threads);
void masked_adamw_cuda(const AdamwBuffers& buffers, const AdamwSettings& settings,
                       const AdamwDeviceNumbers& numbers, const ScatterTable& table, std::uintptr_t stream);

}  // namespace pecker
