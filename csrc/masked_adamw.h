// AdamW on the flat buffers of the active weights: the maths of one element, once for the CPU and the GPU.
//
// Every multiplication and addition is rounded on its own (built without contraction to FMA), in the order of
// the plain-torch reference, so that all builds of this header give the reference's bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "scatter.h"

namespace pecker {

struct AdamwSettings {
  std::int64_t step;  // 1 for the first update
  double lr, beta1, beta2, eps, weight_decay;
  double clip_value;  // infinity: gradients are not clipped
  double ema_decay;
};

struct AdamwConstants {
  float decay;  // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;   // lr / (1 - beta1^step)
  float bias2_sqrt;  // sqrt(1 - beta2^step)
  float eps;
  float clip_value;
  float one_minus_ema_decay;
};

struct AdamwBuffers {
  float* value;       // [numel]
  const float* grad;  // [numel]
  float* exp_avg;     // [numel], or null: no first moment (beta1 = 0)
  float* exp_avg_sq;  // [numel]
  float* ema;         // [numel], or null: no moving average of the values
  std::int64_t numel;
};

// In double: 1 - beta2^step loses all its digits in float when beta2 is near 1.
inline AdamwConstants adamw_constants(const AdamwSettings& s) {
  const double step = static_cast<double>(s.step);
  AdamwConstants c;
  c.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
  c.one_minus_beta1 = static_cast<float>(1.0 - s.beta1);
  c.beta2 = static_cast<float>(s.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - s.beta2);
  c.step_size = static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, step)));
  c.bias2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(s.beta2, step)));
  c.eps = static_cast<float>(s.eps);
  c.clip_value = static_cast<float>(s.clip_value);
  c.one_minus_ema_decay = static_cast<float>(1.0 - s.ema_decay);
  return c;
}

// Both comparisons are false for NaN, which therefore stays NaN.
PECKER_HOST_DEVICE float clamp(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// Updates one weight w with gradient g: m and v are the moments, ema the average of w. Without a first moment
// (or an average) the caller passes a dummy for it.
template <bool kHasExpAvg, bool kHasEma>
PECKER_HOST_DEVICE void adamw_update(const AdamwConstants& c, float g, float& w, float& m, float& v,
                                     float& ema) {
  g = clamp(g, c.clip_value);
  w = w * c.decay;
  m = kHasExpAvg ? m + c.one_minus_beta1 * (g - m) : g;
  v = c.beta2 * v + c.one_minus_beta2 * (g * g);
  w = w - c.step_size * (m / (sqrtf(v) / c.bias2_sqrt + c.eps));
  if (kHasEma) ema = ema + c.one_minus_ema_decay * (w - ema);
}

// The CPU's buffers and table are in host memory, the GPU's in that of the current device; the stream is its.
void masked_adamw_cpu(const AdamwBuffers& buffers, const AdamwConstants& constants, const ScatterTable& table,
                      int threads);
void masked_adamw_cuda(const AdamwBuffers& buffers, const AdamwConstants& constants,
                       const ScatterTable& table, std::uintptr_t stream);

}  // namespace pecker
