// View-dependent colour from spherical harmonics, forward and backward, W primitives at a time: their rows of shN are
// loaded whole and transposed. Bound by memory: K x 3 floats a primitive.
#include <algorithm>
#include <bit>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "columns.h"
#include "parallel.h"
#include "stream.h"

namespace pf {
namespace {

constexpr int64_t kGrain = 2048;
constexpr int kRows = 16;  // of shN in one piece: 16 rows of any degree fill whole cache lines
constexpr int kMaxTerms = 16;
constexpr int kAhead = 2;  // blocks between a prefetch and its use
constexpr float kC0 = 0.28209479177387814f, kC1 = 0.4886025119029199f;
constexpr float kC2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f,
                          0.5462742152960396f};
constexpr float kC3[7] = {-0.5900435899266435f, 2.890611442640554f, -0.4570457994644658f, 0.3731763325901154f,
                          -0.4570457994644658f, 1.445305721320277f, -0.5900435899266435f};

template <int Degree>
PF_INLINE void basis(vf x, vf y, vf z, vf *out) {
  out[0] = broadcast(kC0);
  if constexpr (Degree >= 1) out[1] = -kC1 * y, out[2] = kC1 * z, out[3] = -kC1 * x;
  const vf xx = x * x, yy = y * y, zz = z * z;
  if constexpr (Degree >= 2) {
    out[4] = kC2[0] * x * y, out[5] = kC2[1] * y * z, out[6] = kC2[2] * (2.f * zz - xx - yy);
    out[7] = kC2[3] * x * z, out[8] = kC2[4] * (xx - yy);
  }
  if constexpr (Degree >= 3) {
    out[9] = kC3[0] * y * (3.f * xx - yy), out[10] = kC3[1] * x * y * z, out[11] = kC3[2] * y * (4.f * zz - xx - yy);
    out[12] = kC3[3] * z * (2.f * zz - 3.f * xx - 3.f * yy), out[13] = kC3[4] * x * (4.f * zz - xx - yy);
    out[14] = kC3[5] * z * (xx - yy), out[15] = kC3[6] * x * (xx - 3.f * yy);
  }
}

// sum_k values[k] dY_k, to x, y and z.
template <int Degree>
PF_INLINE void basis_gradient(vf x, vf y, vf z, const vf *values, vf *out) {
  const vf *a = values;
  vf dx = -kC1 * a[3], dy = -kC1 * a[1], dz = kC1 * a[2];
  if constexpr (Degree >= 2) {
    dx += kC2[0] * y * a[4] - 2.f * kC2[2] * x * a[6] + kC2[3] * z * a[7] + 2.f * kC2[4] * x * a[8];
    dy += kC2[0] * x * a[4] + kC2[1] * z * a[5] - 2.f * kC2[2] * y * a[6] - 2.f * kC2[4] * y * a[8];
    dz += kC2[1] * y * a[5] + 4.f * kC2[2] * z * a[6] + kC2[3] * x * a[7];
  }
  if constexpr (Degree >= 3) {
    const vf xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
    dx += 6.f * kC3[0] * xy * a[9] + kC3[1] * yz * a[10] - 2.f * kC3[2] * xy * a[11] - 6.f * kC3[3] * xz * a[12] +
          kC3[4] * (4.f * zz - 3.f * xx - yy) * a[13] + 2.f * kC3[5] * xz * a[14] + 3.f * kC3[6] * (xx - yy) * a[15];
    dy += 3.f * kC3[0] * (xx - yy) * a[9] + kC3[1] * xz * a[10] + kC3[2] * (4.f * zz - xx - 3.f * yy) * a[11] -
          6.f * kC3[3] * yz * a[12] - 2.f * kC3[4] * xy * a[13] - 2.f * kC3[5] * yz * a[14] - 6.f * kC3[6] * xy * a[15];
    dz += kC3[1] * xy * a[10] + 8.f * kC3[2] * yz * a[11] + kC3[3] * (6.f * zz - 3.f * xx - 3.f * yy) * a[12] +
          8.f * kC3[4] * xz * a[13] + kC3[5] * (xx - yy) * a[14];
  }
  out[0] = dx, out[1] = dy, out[2] = dz;
}

struct Inputs {
  const float *sh0, *shN, *means, *viewmats, *radii;
  int64_t count;
  int cameras, row, degree;  // row: floats of shN a primitive

  // The camera's centre, -R^T t.
  void center(int c, float *out) const {
    const float *V = viewmats + 16 * c;
    for (int j = 0; j < 3; j++) out[j] = -(V[j] * V[3] + V[4 + j] * V[7] + V[8 + j] * V[11]);
  }
  int filled(int64_t first) const { return static_cast<int>(std::min<int64_t>(W, count - first)); }
  // Those of the W primitives from `first` on that camera c sees.
  PF_INLINE vm visible(int c, int64_t first) const {
    vf radius[2];
    load_columns<2>(radii + 2 * (c * count + first), filled(first), radius);
    return lt(vf{}, radius[0]);
  }
  // Unit directions from the centre to W primitives; returns 1 / distance.
  PF_INLINE vf directions(int64_t first, const float *center, vf *dir) const {
    load_columns<3>(means + 3 * first, filled(first), dir);
    for (int d = 0; d < 3; d++) dir[d] -= center[d];
    const vf inverse = 1.f / max(sqrt(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]), broadcast(1e-12f));
    for (int d = 0; d < 3; d++) dir[d] *= inverse;
    return inverse;
  }
};

// The higher terms of degree `Degree` as whole vectors of a row, the last one in part.
template <int Degree>
struct Rest {
  static constexpr int kFloats = 3 * ((Degree + 1) * (Degree + 1) - 1), kVectors = (kFloats + W - 1) / W;
  static constexpr int in(int vector) { return std::min(W, kFloats - vector * W); }
};

// Calls visit(term, channel, coefficients of W primitives) for each coefficient of the higher terms. Only the rows in
// `wanted` are touched in memory; the others read as 0.
template <int Degree, class Visit>
PF_INLINE void visit_rest(const float *rows, int row, uint32_t wanted, Visit visit) {
  for (int vector = 0; vector < Rest<Degree>::kVectors; vector++) {
    vf columns[W];
    if (2 * std::popcount(wanted) > W)  // then most of those to come probably are, too
      for (int lane = 0; lane < W; lane++) __builtin_prefetch(rows + row * (kAhead * W + lane) + vector * W);
    for (int lane = 0; lane < W; lane++)
      columns[lane] = load_some(rows + row * lane + vector * W, wanted >> lane & 1 ? Rest<Degree>::in(vector) : 0);
    transpose(columns);
    for (int k = 0; k < Rest<Degree>::in(vector); k++)
      visit((vector * W + k) / 3 + 1, (vector * W + k) % 3, columns[k]);
  }
}

template <int Degree>
void forward_block(const Inputs &in, int c, const float *center, int64_t first, float *out) {
  const int filled = in.filled(first);
  const vm visible = in.visible(c, first);
  float *rgbs = out + 3 * (c * in.count + first);
  if (!any(visible)) return void(std::fill(rgbs, rgbs + 3 * filled, 0.f));
  vf dir[3], b[kMaxTerms], color[3];
  in.directions(first, center, dir);
  basis<Degree>(dir[0], dir[1], dir[2], b);
  load_columns<3>(in.sh0 + 3 * first, filled, color);
  for (int d = 0; d < 3; d++) color[d] = kC0 * color[d] + 0.5f;
  visit_rest<Degree>(in.shN + in.row * first, in.row, lane_bits(visible),
                     [&](int k, int d, vf coefficient) { color[d] += b[k] * coefficient; });
  for (int d = 0; d < 3; d++) color[d] = keep(visible, max(color[d], vf{}));
  store_columns<3>(rgbs, filled, color);
}

struct Gradients {
  float *sh0, *shN, *means;  // shN is null where its gradient is not wanted
};

// Gradient of the higher terms, an outer product of basis and colour gradient, for the rows in `lit`; the first camera
// writes all `filled` rows, the others add.
template <int Degree>
PF_INLINE void store_rest(float *rows, int row, int filled, uint32_t lit, bool add, const vf *b, const vf *v) {
  for (int vector = 0; vector < Rest<Degree>::kVectors; vector++) {
    constexpr int kFloats = Rest<Degree>::kFloats;
    const int floats = Rest<Degree>::in(vector);
    vf columns[W] = {};
    for (int k = 0; k < floats; k++) columns[k] = b[(vector * W + k) / 3 + 1] * v[(vector * W + k) % 3];
    transpose(columns);
    for (int lane = 0; lane < filled; lane++) {
      float *to = rows + row * lane + vector * W;
      if (add && !(lit >> lane & 1)) continue;
      store_some(to, add ? columns[lane] + load_some(to, floats) : columns[lane], floats);
      if (!add && vector == 0) std::fill(to + kFloats, to + row, 0.f);
    }
  }
}

// What a block gets from all cameras, and each camera's centre from it.
struct BlockGradients {
  vf sh0[3] = {}, means[3] = {};
};

// Adds what W primitives get from camera c. `v_rest` are their rows of shN's gradient, if wanted; `v_center`, if
// wanted, collects that of the camera's centre.
template <int Degree>
PF_INLINE void backward_block(const Inputs &in, int c, const float *center, int64_t first, const float *rgbs,
                              const float *v_rgbs, float *v_rest, BlockGradients &out, float *v_center) {
  const int filled = in.filled(first);
  const int64_t at = 3 * (c * in.count + first);
  vm lit = in.visible(c, first);
  vf color[3], v[3];
  if (any(lit)) {
    load_columns<3>(rgbs + at, filled, color);
    load_columns<3>(v_rgbs + at, filled, v);
    for (int d = 0; d < 3; d++) v[d] = keep(both(lit, lt(vf{}, color[d])), v[d]);
    lit = but_not(lit, le(abs(v[0]) + abs(v[1]) + abs(v[2]), vf{}));  // hidden behind others; NaN counts as lit
  }
  if (!any(lit)) {
    if (v_rest && c == 0) std::fill(v_rest, v_rest + in.row * filled, 0.f);
    return;
  }
  for (int d = 0; d < 3; d++) out.sh0[d] += kC0 * v[d];
  if constexpr (Degree == 0) {
    if (v_rest && c == 0) std::fill(v_rest, v_rest + in.row * filled, 0.f);
  } else {
    vf dir[3], b[kMaxTerms], values[kMaxTerms] = {}, v_dir[3];
    const vf inverse = in.directions(first, center, dir);
    if (v_rest) {
      basis<Degree>(dir[0], dir[1], dir[2], b);
      store_rest<Degree>(v_rest, in.row, filled, lane_bits(lit), c > 0, b, v);
    }
    visit_rest<Degree>(in.shN + in.row * first, in.row, lane_bits(lit),
                       [&](int k, int d, vf coefficient) { values[k] += coefficient * v[d]; });
    basis_gradient<Degree>(dir[0], dir[1], dir[2], values, v_dir);
    const vf along = v_dir[0] * dir[0] + v_dir[1] * dir[1] + v_dir[2] * dir[2];
    for (int d = 0; d < 3; d++) {
      const vf v_position = keep(lit, (v_dir[d] - along * dir[d]) * inverse);
      out.means[d] += v_position;
      if (v_center) v_center[d] -= sum(v_position);
    }
  }
}

// Calls visit with the degree as a compile-time constant.
template <class Visit>
void with_degree(int degree, Visit visit) {
  switch (degree) {
    case 0:
      return visit.template operator()<0>();
    case 1:
      return visit.template operator()<1>();
    case 2:
      return visit.template operator()<2>();
    default:
      return visit.template operator()<3>();
  }
}

Inputs make_inputs(Floats sh0, Floats shN, Floats means, Floats viewmats, Floats radii, int degree) {
  return {sh0.data(),
          shN.data(),
          means.data(),
          viewmats.data(),
          radii.data(),
          static_cast<int64_t>(means.shape(0)),
          static_cast<int>(viewmats.shape(0)),
          3 * static_cast<int>(shN.shape(1)),
          degree};
}

void sh_forward(Floats sh0, Floats shN, Floats means, Floats viewmats, Floats radii, int degree, Floats rgbs) {
  const Inputs in = make_inputs(sh0, shN, means, viewmats, radii, degree);
  float *out = rgbs.data();
  nb::gil_scoped_release unlocked;
  for (int c = 0; c < in.cameras; c++) {
    float center[3];
    in.center(c, center);
    with_degree(degree, [&]<int Degree>() {
      parallel_for(in.count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += W) forward_block<Degree>(in, c, center, first, out);
      });
    });
  }
}

void sh_backward(Floats sh0, Floats shN, Floats means, Floats viewmats, Floats radii, int degree, Floats rgbs,
                 Floats v_rgbs, bool camera_gradient, Floats v_sh0, Floats v_shN, Floats v_means, Floats v_viewmats) {
  const Inputs in = make_inputs(sh0, shN, means, viewmats, radii, degree);
  const Gradients out{v_sh0.data(), v_shN.size() > 0 ? v_shN.data() : nullptr, v_means.data()};
  const float *colors = rgbs.data(), *v_colors = v_rgbs.data();
  float *v_cameras = v_viewmats.data();
  nb::gil_scoped_release unlocked;
  const int64_t chunks = (in.count + kGrain - 1) / kGrain;
  std::vector<float> centers(in.cameras * 3);
  for (int c = 0; c < in.cameras; c++) in.center(c, &centers[3 * c]);
  std::vector<float> partial(chunks * in.cameras * 3, 0.f);
  const bool streamed = out.shN && stream_pays(in.count * in.row, out.shN);
  const auto run_chunk = [&]<int Degree>(int64_t chunk) {
    alignas(64) float rows[kRows * 3 * (kMaxTerms - 1)];
    const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t stop = std::min(first + kRows, end);
      for (int64_t block = first; block < stop; block += W) {
        float *v_rest = streamed ? rows + in.row * (block - first) : out.shN ? out.shN + in.row * block : nullptr;
        BlockGradients v;
        for (int c = 0; c < in.cameras; c++) {
          float *v_center = camera_gradient ? &partial[(chunk * in.cameras + c) * 3] : nullptr;
          backward_block<Degree>(in, c, &centers[3 * c], block, colors, v_colors, v_rest, v, v_center);
        }
        store_columns<3>(out.sh0 + 3 * block, in.filled(block), v.sh0);
        store_columns<3>(out.means + 3 * block, in.filled(block), v.means);
      }
      if (streamed) stream(out.shN + in.row * first, rows, in.row * (stop - first));
    }
  };
  with_degree(degree, [&]<int Degree>() {
    parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
      for (; chunk < last; chunk++) run_chunk.template operator()<Degree>(chunk);
      stream_fence();
    });
  });
  if (!camera_gradient) return;
  for (int c = 0; c < in.cameras; c++) {
    float v_center[3] = {};
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int d = 0; d < 3; d++) v_center[d] += partial[(chunk * in.cameras + c) * 3 + d];
    const float *V = in.viewmats + 16 * c;  // center_j = -sum_i V[i][j] t_i
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 3; j++) {
        v_cameras[16 * c + 4 * i + j] -= V[4 * i + 3] * v_center[j];
        v_cameras[16 * c + 4 * i + 3] -= V[4 * i + j] * v_center[j];
      }
  }
}

}  // namespace

void bind_sh(nb::module_ &m) {
  m.def("sh_forward", &sh_forward);
  m.def("sh_backward", &sh_backward);
}

}  // namespace pf
