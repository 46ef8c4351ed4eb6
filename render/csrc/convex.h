// The smooth convex polygon of the tile rasterizer.
#pragma once
#include <algorithm>
#include "constants.h"
#include "simd.h"
#include "span.h"

namespace pf {

// Base-2 logarithm of normal positive x, absolute error 1e-7; without the division of `log`.
PF_INLINE vf log2(vf x) {
  const vi bits = (vi)x, exponent = (bits - 0x3f3504f3) >> 23;  // mantissa into [sqrt(1/2), sqrt(2))
  const vf m = (vf)(bits - (exponent << 23)) - 1.f;
  vf p = m * -0.146207051f + 0.234215370f;
  p = p * m - 0.248822883f;
  p = p * m + 0.287075032f;
  p = p * m - 0.360241863f;
  p = p * m + 0.480924054f;
  p = p * m - 0.721352761f;
  p = p * m + 1.442694958f;
  return to_float(exponent) + p * m;
}

// alpha = opacity / (1 + exp(sigma phi)), phi = log sum_j exp(delta L_j), with L_j the signed distance to edge j. All
// exponents are of 2.
template <int Room>
struct Convex {
  static constexpr int kParams = 2 * Room + 5;  // x, y, corners relative to it, delta, sigma, opacity
  static constexpr int kSums = 2 * Room + 3;
  struct Pixels {
    vf weights[Room], inverse;  // of the edges; and what makes their sum 1
    vf share;                   // alpha / opacity
    vf phi;
    vf mean;                    // of the exponents, weighted
  };

  explicit Convex(const float *p)
      : x(p[0]),
        y(p[1]),
        corners(p + 2),
        delta(p[2 * Room + 2]),
        sigma(p[2 * Room + 3]),
        opacity(p[2 * Room + 4]),
        edges(0) {
    for (int i = 0; i < Room; i++) {
      const float *from = corner(i), *to = corner(i + 1);
      const float ex = to[0] - from[0], ey = to[1] - from[1], squared = ex * ex + ey * ey;
      if (squared == 0.f) break;  // the first corner again
      const float inverse = 1.f / std::sqrt(squared), scale = delta * kLog2e * inverse;
      normal_x[i] = ey * inverse, normal_y[i] = -ex * inverse;
      out_x[i] = ey * scale, out_y[i] = -ex * scale, out[i] = ex * scale * from[1] - ey * scale * from[0];
      along_x[i] = ex * inverse * inverse, along_y[i] = ey * inverse * inverse;
      along[i] = -along_x[i] * from[0] - along_y[i] * from[1];
      edges = i + 1;
    }
  }

  PF_INLINE vm alpha(vf dx, vf dy, vf &alpha, Pixels &pixels) const {
    vf exponents[Room], highest = broadcast(-1e30f);
    for (int i = 0; i < edges; i++) {
      exponents[i] = out_x[i] * dx + (out_y[i] * dy + out[i]);
      highest = max(highest, exponents[i]);
    }
    vf total{}, weighted{};
    for (int i = 0; i < edges; i++) {
      const vf exponent = max(exponents[i] - highest, broadcast(kLeast));
      pixels.weights[i] = exp2(exponent);
      total += pixels.weights[i];
      weighted += pixels.weights[i] * exponent;
    }
    pixels.inverse = reciprocal(total);
    pixels.mean = highest + weighted * pixels.inverse;
    pixels.phi = highest + log2(total);
    const vf steep = sigma * pixels.phi, power = exp2(max(-abs(steep), broadcast(kLeast)));
    pixels.share = select(lt(steep, vf{}), broadcast(1.f), power) * reciprocal(1.f + power);
    alpha = opacity * pixels.share;
    return ge(alpha, broadcast(kAlphaMin));
  }

  PF_INLINE void accumulate(vf dx, vf dy, vf alpha, vf v_alpha, const Pixels &pixels, vf *sums) const {
    const vf v_opacity = alpha * v_alpha, v_phi = v_opacity * (1.f - pixels.share), v_weight = v_phi * pixels.inverse;
    sums[0] += v_opacity;
    sums[1] += v_phi * pixels.phi;
    sums[2] += v_phi * pixels.mean;
    for (int i = 0; i < edges; i++) {
      const vf v = v_weight * pixels.weights[i];
      sums[3 + 2 * i] += v;
      sums[4 + 2 * i] += v * (along_x[i] * dx + (along_y[i] * dy + along[i]));
    }
  }

  PF_INLINE void accumulate_absolute(vf, vf, vf alpha, vf v_alpha, const Pixels &pixels, vf *sums) const {
    const vf v_phi = (sigma * delta) * alpha * v_alpha * (1.f - pixels.share) * pixels.inverse;
    vf v_x{}, v_y{};
    for (int i = 0; i < edges; i++) v_x += pixels.weights[i] * normal_x[i], v_y += pixels.weights[i] * normal_y[i];
    sums[0] += abs(v_phi * v_x);
    sums[1] += abs(v_phi * v_y);
  }

  // An edge moves with its ends: L changes by minus its normal, times 1 - s for the first and s for the second where s
  // is the position along the edge.
  void finish(const float *sums, float *v_params) const {
    std::fill(v_params, v_params + kParams, 0.f);
    float *v_corners = v_params + 2;
    const float scale = sigma * delta;
    for (int i = 0; i < edges; i++) {
      const float all = scale * sums[3 + 2 * i], second = scale * sums[4 + 2 * i], first = all - second;
      const int next = (i + 1) % Room;
      v_params[0] += normal_x[i] * all, v_params[1] += normal_y[i] * all;
      v_corners[2 * i] += normal_x[i] * first, v_corners[2 * i + 1] += normal_y[i] * first;
      v_corners[2 * next] += normal_x[i] * second, v_corners[2 * next + 1] += normal_y[i] * second;
    }
    v_params[2 * Room + 2] = -sigma / (delta * kLog2e) * sums[2];
    v_params[2 * Room + 3] = -1.f / kLog2e * sums[1];
    v_params[2 * Room + 4] = sums[0] / opacity;
  }

  // The polygon with its edges moved outwards to where phi, if one edge alone gave it, takes alpha to kAlphaMin.
  struct Outline {
    float low[Room], high[Room], x_low[Room], slope[Room];  // of each edge: its heights, and x along it
    int edges;

    template <class T>
    PF_INLINE Span<T> row_span(T y0, T y1) const {
      T left = T{} + 1e30f, right = T{} - 1e30f;
      for (int i = 0; i < edges; i++) {
        const T from = max(y0, T{} + low[i]), to = min(y1, T{} + high[i]);
        const T a = x_low[i] + slope[i] * (from - low[i]), b = x_low[i] + slope[i] * (to - low[i]);
        const auto crossed = le(from, to);
        left = select(crossed, min(left, min(a, b)), left);
        right = select(crossed, max(right, max(a, b)), right);
      }
      return {left, right};
    }
  };

  // Slightly enlarged against rounding.
  Outline outline() const {
    Outline o;
    o.edges = opacity > kAlphaMin ? edges : 0;
    if (!o.edges) return o;
    const float level = std::log(std::max(opacity / kAlphaMin - 1.f, 1.f));
    const float margin = level / (sigma * delta) * 1.0001f + 1e-3f;
    float corner_x[Room + 1], corner_y[Room + 1];
    for (int i = 0; i < edges; i++) {
      const int before = i ? i - 1 : edges - 1;
      const float both = 1.f + normal_x[i] * normal_x[before] + normal_y[i] * normal_y[before];
      const float shift = margin / std::max(both, 1e-12f);
      corner_x[i] = x + corner(i)[0] + shift * (normal_x[i] + normal_x[before]);
      corner_y[i] = y + corner(i)[1] + shift * (normal_y[i] + normal_y[before]);
    }
    corner_x[edges] = corner_x[0], corner_y[edges] = corner_y[0];
    for (int i = 0; i < edges; i++) {
      const int lower = corner_y[i] <= corner_y[i + 1] ? i : i + 1, upper = 2 * i + 1 - lower;
      const float rise = corner_y[upper] - corner_y[lower];
      o.low[i] = corner_y[lower], o.high[i] = corner_y[upper], o.x_low[i] = corner_x[lower];
      o.slope[i] = rise > 0.f ? (corner_x[upper] - corner_x[lower]) / rise : 0.f;
    }
    return o;
  }

  static constexpr float kLeast = -126.f;  // exponent of the smallest normal number
  const float *corner(int i) const { return corners + 2 * (i < Room ? i : 0); }

  float x, y;
  const float *corners;
  float delta, sigma, opacity;
  int edges;
  // Of each edge: its outward normal; delta times the distance, and the position along it (0 at its start, 1 at its
  // end), as linear functions of the pixel relative to (x, y).
  float normal_x[Room], normal_y[Room], out_x[Room], out_y[Room], out[Room], along_x[Room], along_y[Room], along[Room];
};

}  // namespace pf
