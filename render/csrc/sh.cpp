// View-dependent colour from spherical harmonics, forward and backward. Bound by memory: K x 3 floats a primitive.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "stream.h"

namespace pf {
namespace {

constexpr int64_t kGrain = 2048;
constexpr int kRows = 16;  // of shN in one block: 16 rows of any degree fill whole cache lines
constexpr int kMaxTerms = 16;
constexpr float kC0 = 0.28209479177387814f, kC1 = 0.4886025119029199f;
constexpr float kC2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f,
                          0.5462742152960396f};
constexpr float kC3[7] = {-0.5900435899266435f, 2.890611442640554f, -0.4570457994644658f, 0.3731763325901154f,
                          -0.4570457994644658f, 1.445305721320277f, -0.5900435899266435f};

inline void basis(int degree, float x, float y, float z, float *out) {
  out[0] = kC0;
  if (degree < 1) return;
  out[1] = -kC1 * y, out[2] = kC1 * z, out[3] = -kC1 * x;
  if (degree < 2) return;
  const float xx = x * x, yy = y * y, zz = z * z;
  out[4] = kC2[0] * x * y, out[5] = kC2[1] * y * z, out[6] = kC2[2] * (2 * zz - xx - yy);
  out[7] = kC2[3] * x * z, out[8] = kC2[4] * (xx - yy);
  if (degree < 3) return;
  out[9] = kC3[0] * y * (3 * xx - yy), out[10] = kC3[1] * x * y * z, out[11] = kC3[2] * y * (4 * zz - xx - yy);
  out[12] = kC3[3] * z * (2 * zz - 3 * xx - 3 * yy), out[13] = kC3[4] * x * (4 * zz - xx - yy);
  out[14] = kC3[5] * z * (xx - yy), out[15] = kC3[6] * x * (xx - 3 * yy);
}

// Derivatives of the basis to x, y and z.
inline void basis_gradient(int degree, float x, float y, float z, float (*out)[kMaxTerms]) {
  float *dx = out[0], *dy = out[1], *dz = out[2];
  if (degree < 1) return;
  dx[1] = 0, dy[1] = -kC1, dz[1] = 0;
  dx[2] = 0, dy[2] = 0, dz[2] = kC1;
  dx[3] = -kC1, dy[3] = 0, dz[3] = 0;
  if (degree < 2) return;
  dx[4] = kC2[0] * y, dy[4] = kC2[0] * x, dz[4] = 0;
  dx[5] = 0, dy[5] = kC2[1] * z, dz[5] = kC2[1] * y;
  dx[6] = -2 * kC2[2] * x, dy[6] = -2 * kC2[2] * y, dz[6] = 4 * kC2[2] * z;
  dx[7] = kC2[3] * z, dy[7] = 0, dz[7] = kC2[3] * x;
  dx[8] = 2 * kC2[4] * x, dy[8] = -2 * kC2[4] * y, dz[8] = 0;
  if (degree < 3) return;
  const float xx = x * x, yy = y * y, zz = z * z;
  dx[9] = 6 * kC3[0] * x * y, dy[9] = 3 * kC3[0] * (xx - yy), dz[9] = 0;
  dx[10] = kC3[1] * y * z, dy[10] = kC3[1] * x * z, dz[10] = kC3[1] * x * y;
  dx[11] = -2 * kC3[2] * x * y, dy[11] = kC3[2] * (4 * zz - xx - 3 * yy), dz[11] = 8 * kC3[2] * y * z;
  dx[12] = -6 * kC3[3] * x * z, dy[12] = -6 * kC3[3] * y * z, dz[12] = kC3[3] * (6 * zz - 3 * xx - 3 * yy);
  dx[13] = kC3[4] * (4 * zz - 3 * xx - yy), dy[13] = -2 * kC3[4] * x * y, dz[13] = 8 * kC3[4] * x * z;
  dx[14] = 2 * kC3[5] * x * z, dy[14] = -2 * kC3[5] * y * z, dz[14] = kC3[5] * (xx - yy);
  dx[15] = 3 * kC3[6] * (xx - yy), dy[15] = -6 * kC3[6] * x * y, dz[15] = 0;
}

// One colour and a spare lane. Coefficients lie three by three, so four are loaded and the fourth is ignored.
typedef float Color __attribute__((vector_size(16)));
inline Color load3(const float *p) { return Color{p[0], p[1], p[2], 0.f}; }
inline Color load4(const float *p) {
  Color c;
  std::memcpy(&c, p, sizeof c);
  return c;
}
inline void store3(float *p, Color c) { p[0] = c[0], p[1] = c[1], p[2] = c[2]; }
inline void store4(float *p, Color c) { std::memcpy(p, &c, sizeof c); }

struct Inputs {
  const float *sh0, *shN, *means, *viewmats, *radii;
  int64_t count;
  int cameras, stored, degree;  // stored: terms in shN

  int terms() const { return (degree + 1) * (degree + 1); }
  // The camera's centre, -R^T t.
  void center(int c, float *out) const {
    const float *V = viewmats + 16 * c;
    for (int j = 0; j < 3; j++) out[j] = -(V[j] * V[3] + V[4 + j] * V[7] + V[8 + j] * V[11]);
  }
  // Unit direction from the centre to primitive i; returns 1 / distance.
  float direction(int64_t i, const float *center, float *dir) const {
    for (int d = 0; d < 3; d++) dir[d] = means[3 * i + d] - center[d];
    const float inverse = 1.f / std::max(std::sqrt(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]), 1e-12f);
    for (int d = 0; d < 3; d++) dir[d] *= inverse;
    return inverse;
  }
};

Inputs make_inputs(Floats sh0, Floats shN, Floats means, Floats viewmats, Floats radii, int degree) {
  return {sh0.data(),
          shN.data(),
          means.data(),
          viewmats.data(),
          radii.data(),
          static_cast<int64_t>(means.shape(0)),
          static_cast<int>(viewmats.shape(0)),
          static_cast<int>(shN.shape(1)),
          degree};
}

void sh_forward(Floats sh0, Floats shN, Floats means, Floats viewmats, Floats radii, int degree, Floats rgbs) {
  const Inputs in = make_inputs(sh0, shN, means, viewmats, radii, degree);
  float *out = rgbs.data();
  nb::gil_scoped_release unlocked;
  for (int c = 0; c < in.cameras; c++) {
    float center[3];
    in.center(c, center);
    parallel_for(in.count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        float *rgb = out + 3 * (c * in.count + i);
        if (!(in.radii[2 * (c * in.count + i)] > 0.f)) {
          rgb[0] = rgb[1] = rgb[2] = 0.f;
          continue;
        }
        float dir[3], b[kMaxTerms];
        in.direction(i, center, dir);
        basis(in.degree, dir[0], dir[1], dir[2], b);
        const float *rest = in.shN + 3 * in.stored * i;
        const int last = in.terms() - 2;  // the last coefficient used is loaded alone: nothing may follow it in memory
        Color color = kC0 * load3(in.sh0 + 3 * i) + 0.5f;
        for (int k = 0; k < last; k++) color += b[k + 1] * load4(rest + 3 * k);
        if (last >= 0) color += b[last + 1] * load3(rest + 3 * last);
        for (int d = 0; d < 3; d++) rgb[d] = std::max(color[d], 0.f);
      }
    });
  }
}

struct Gradients {
  float *sh0, *shN, *means;  // shN is null where its gradient is not wanted
};

// Adds the gradients that primitive i gets from camera c; `v_center` collects the camera centre's, `v_rest` is the row
// of shN, if wanted: the first camera writes it, the others add to it.
void backward_one(const Inputs &in, int c, int64_t i, const float *center, const float *rgbs, const float *v_rgbs,
                  const Gradients &out, float *v_rest, float *v_center) {
  const int64_t at = c * in.count + i;
  const int last = in.terms() - 2;
  const float *rest = in.shN + 3 * in.stored * i;
  Color v{};
  if (in.radii[2 * at] > 0.f)
    for (int d = 0; d < 3; d++) v[d] = rgbs[3 * at + d] > 0.f ? v_rgbs[3 * at + d] : 0.f;
  const bool lit = v[0] != 0.f || v[1] != 0.f || v[2] != 0.f;  // not hidden behind others
  if (v_rest && c == 0) std::fill(v_rest + (lit ? 3 * (last + 1) : 0), v_rest + 3 * in.stored, 0.f);
  if (!lit) return;
  store3(out.sh0 + 3 * i, load3(out.sh0 + 3 * i) + kC0 * v);
  if (last < 0) return;
  float dir[3], b[kMaxTerms], db[3][kMaxTerms];
  const float inverse = in.direction(i, center, dir);
  if (v_rest) {
    basis(in.degree, dir[0], dir[1], dir[2], b);
    if (c == 0) {
      for (int k = 0; k < last; k++) store4(v_rest + 3 * k, b[k + 1] * v);
      store3(v_rest + 3 * last, b[last + 1] * v);
    } else {
      for (int k = 0; k <= last; k++) store3(v_rest + 3 * k, load3(v_rest + 3 * k) + b[k + 1] * v);
    }
  }
  basis_gradient(in.degree, dir[0], dir[1], dir[2], db);
  Color toward[3];
  for (int d = 0; d < 3; d++) toward[d] = db[d][last + 1] * load3(rest + 3 * last);
  for (int k = 0; k < last; k++) {
    const Color coefficient = load4(rest + 3 * k);
    for (int d = 0; d < 3; d++) toward[d] += db[d][k + 1] * coefficient;
  }
  float v_dir[3], along = 0.f;
  for (int d = 0; d < 3; d++) {
    const Color product = toward[d] * v;
    v_dir[d] = product[0] + product[1] + product[2];
    along += v_dir[d] * dir[d];
  }
  for (int d = 0; d < 3; d++) {
    const float v_position = (v_dir[d] - along * dir[d]) * inverse;
    out.means[3 * i + d] += v_position;
    v_center[d] -= v_position;
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
  const int64_t row = 3 * in.stored;
  const bool streamed = out.shN && stream_pays(in.count * row, out.shN);
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
    alignas(64) float rows[kRows * 3 * (kMaxTerms - 1)];
    for (; chunk < last; chunk++) {
      const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
      std::fill(out.sh0 + 3 * begin, out.sh0 + 3 * end, 0.f);
      std::fill(out.means + 3 * begin, out.means + 3 * end, 0.f);
      for (int64_t first = begin; first < end; first += kRows) {
        const int64_t stop = std::min(first + kRows, end);
        for (int c = 0; c < in.cameras; c++) {
          const float *center = &centers[3 * c];
          float *v_center = &partial[(chunk * in.cameras + c) * 3];
          for (int64_t i = first; i < stop; i++) {
            float *v_rest = streamed ? rows + row * (i - first) : out.shN ? out.shN + row * i : nullptr;
            backward_one(in, c, i, center, colors, v_colors, out, v_rest, v_center);
          }
        }
        if (streamed) stream(out.shN + row * first, rows, row * (stop - first));
      }
    }
    stream_fence();
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
