// The 2D Gaussian of the tile rasterizer.
#pragma once
#include "constants.h"
#include "simd.h"
#include "span.h"

namespace pf {

// alpha = exp(log_opacity - (a dx^2 + c dy^2) / 2 - b dx dy), evaluated as a power of two.
struct Gaussian {
  static constexpr int kParams = 6;  // x, y, a, b, c, log_opacity
  static constexpr int kSums = 6;    // per-pixel sums from which the parameters' gradients follow
  struct Pixels {};                  // what a block of pixels has in store for `accumulate` beside its alpha

  explicit Gaussian(const float *p)
      : x(p[0]),
        y(p[1]),
        a(p[2]),
        b(p[3]),
        c(p[4]),
        log_opacity(p[5]),
        xx(-0.5f * kLog2e * a),
        xy(-kLog2e * b),
        yy(-0.5f * kLog2e * c),
        peak_exponent(kLog2e * log_opacity) {}

  // `dx`, `dy`: pixel minus centre. Returns the lanes where alpha reaches kAlphaMin; alpha is garbage in the others.
  PF_INLINE vm alpha(vf dx, vf dy, vf &alpha, Pixels &) const {
    const vf exponent = dx * (xx * dx + xy * dy) + (yy * dy * dy + peak_exponent);
    alpha = exp2(exponent);
    return ge(exponent, broadcast(kLog2e * kLogAlphaMin));
  }

  // Adds one pixel block's part of the sums; `alpha` is 0 in lanes that do not count.
  PF_INLINE void accumulate(vf dx, vf dy, vf alpha, vf v_alpha, const Pixels &, vf *sums) const {
    const vf v = alpha * v_alpha, vx = v * dx, vy = v * dy;
    sums[0] += v;
    sums[1] += vx;
    sums[2] += vy;
    sums[3] += vx * dx;
    sums[4] += vx * dy;
    sums[5] += vy * dy;
  }

  // Adds |dL/dx| and |dL/dy| pixel by pixel.
  PF_INLINE void accumulate_absolute(vf dx, vf dy, vf alpha, vf v_alpha, const Pixels &, vf *sums) const {
    const vf v = alpha * v_alpha;
    sums[0] += abs(v * (a * dx + b * dy));
    sums[1] += abs(v * (b * dx + c * dy));
  }

  // The gradients of the parameters from the finished sums.
  void finish(const float *sums, float *v_params) const {
    v_params[0] = a * sums[1] + b * sums[2];
    v_params[1] = b * sums[1] + c * sums[2];
    v_params[2] = -0.5f * sums[3];
    v_params[3] = -sums[4];
    v_params[4] = -0.5f * sums[5];
    v_params[5] = sums[0];
  }

  // Where alpha reaches kAlphaMin between two heights.
  struct Outline {
    float x, y, half_height, peak, slope, level_a, det, inv_a;

    template <class T>
    PF_INLINE Span<T> row_span(T y0, T y1) const {
      const T d0 = max(y0 - y, T{} - half_height), d1 = min(y1 - y, T{} + half_height);
      const T right_d = min(max(T{} + peak, d0), d1), left_d = min(max(T{} - peak, d0), d1);
      const T right = x - slope * right_d + inv_a * sqrt(max(level_a - det * right_d * right_d, T{}));
      const T left = x - slope * left_d - inv_a * sqrt(max(level_a - det * left_d * left_d, T{}));
      const auto reached = le(d0, d1);
      return {select(reached, left, T{} + 1e30f), select(reached, right, T{} - 1e30f)};
    }
  };

  // Slightly enlarged against rounding.
  Outline outline() const {
    const float level = max(2.f * (log_opacity - kLogAlphaMin), 0.f) * 1.0001f + 1e-4f;
    const float det = a * c - b * b, inv_a = 1.f / a;
    const float half_height = sqrt(level * a / det), peak = -b / c * sqrt(level * c / det);
    return {x, y, half_height, peak, b * inv_a, level * a, det, inv_a};
  }

  float x, y, a, b, c, log_opacity, xx, xy, yy, peak_exponent;
};

}  // namespace pf
