// View-dependent colour from spherical harmonics, forward and backward. Bound by memory: K x 3 floats a primitive.
#include <algorithm>
#include <cmath>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"

namespace pf {
namespace {

constexpr int64_t kGrain = 2048;
constexpr int kMaxTerms = 16;
constexpr float kC0 = 0.28209479177387814f, kC1 = 0.4886025119029199f;
constexpr float kC2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f, 0.5462742152960396f};
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

// The gradient of sum_k v[k] * basis_k to the direction.
inline void basis_vjp(int degree, float x, float y, float z, const float *v, float *v_dir) {
  float gx = 0, gy = 0, gz = 0;
  if (degree >= 1) gx -= kC1 * v[3], gy -= kC1 * v[1], gz += kC1 * v[2];
  if (degree >= 2) {
    gx += kC2[0] * y * v[4] - 2 * kC2[2] * x * v[6] + kC2[3] * z * v[7] + 2 * kC2[4] * x * v[8];
    gy += kC2[0] * x * v[4] + kC2[1] * z * v[5] - 2 * kC2[2] * y * v[6] - 2 * kC2[4] * y * v[8];
    gz += kC2[1] * y * v[5] + 4 * kC2[2] * z * v[6] + kC2[3] * x * v[7];
  }
  if (degree >= 3) {
    const float xx = x * x, yy = y * y, zz = z * z;
    gx += 6 * kC3[0] * x * y * v[9] + kC3[1] * y * z * v[10] - 2 * kC3[2] * x * y * v[11] - 6 * kC3[3] * x * z * v[12] +
          kC3[4] * (4 * zz - 3 * xx - yy) * v[13] + 2 * kC3[5] * x * z * v[14] + 3 * kC3[6] * (xx - yy) * v[15];
    gy += 3 * kC3[0] * (xx - yy) * v[9] + kC3[1] * x * z * v[10] + kC3[2] * (4 * zz - xx - 3 * yy) * v[11] -
          6 * kC3[3] * y * z * v[12] - 2 * kC3[4] * x * y * v[13] - 2 * kC3[5] * y * z * v[14] - 6 * kC3[6] * x * y * v[15];
    gz += kC3[1] * x * y * v[10] + 8 * kC3[2] * y * z * v[11] + kC3[3] * (6 * zz - 3 * xx - 3 * yy) * v[12] +
          8 * kC3[4] * x * z * v[13] + kC3[5] * (xx - yy) * v[14];
  }
  v_dir[0] = gx, v_dir[1] = gy, v_dir[2] = gz;
}

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
  return {sh0.data(), shN.data(), means.data(), viewmats.data(), radii.data(), static_cast<int64_t>(means.shape(0)),
          static_cast<int>(viewmats.shape(0)), static_cast<int>(shN.shape(1)), degree};
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
        const float *dc = in.sh0 + 3 * i, *rest = in.shN + 3 * in.stored * i - 3;
        float r = kC0 * dc[0] + 0.5f, g = kC0 * dc[1] + 0.5f, bl = kC0 * dc[2] + 0.5f;
        for (int k = 1; k < in.terms(); k++) r += b[k] * rest[3 * k], g += b[k] * rest[3 * k + 1], bl += b[k] * rest[3 * k + 2];
        rgb[0] = std::max(r, 0.f), rgb[1] = std::max(g, 0.f), rgb[2] = std::max(bl, 0.f);
      }
    });
  }
}

struct Gradients {
  float *sh0, *shN, *means;  // shN is null where its gradient is not wanted
};

// Adds the gradients that primitive i gets from camera c; `v_center` collects the camera centre's.
void backward_one(const Inputs &in, int c, int64_t i, const float *center, const float *rgbs, const float *v_rgbs,
                  const Gradients &out, float *v_center) {
  const int64_t at = c * in.count + i;
  if (!(in.radii[2 * at] > 0.f)) return;
  float v[3], dir[3], b[kMaxTerms], v_basis[kMaxTerms], v_dir[3];
  for (int d = 0; d < 3; d++) v[d] = rgbs[3 * at + d] > 0.f ? v_rgbs[3 * at + d] : 0.f;
  if (v[0] == 0.f && v[1] == 0.f && v[2] == 0.f) return;  // hidden behind others
  const float inverse = in.direction(i, center, dir);
  basis(in.degree, dir[0], dir[1], dir[2], b);
  for (int d = 0; d < 3; d++) out.sh0[3 * i + d] += kC0 * v[d];
  const float *rest = in.shN + 3 * in.stored * i - 3;
  float *v_rest = out.shN ? out.shN + 3 * in.stored * i - 3 : nullptr;
  if (out.shN)
    for (int k = 1; k < in.terms(); k++)
      for (int d = 0; d < 3; d++) v_rest[3 * k + d] += b[k] * v[d];
  if (in.degree == 0) return;
  for (int k = 1; k < in.terms(); k++)
    v_basis[k] = rest[3 * k] * v[0] + rest[3 * k + 1] * v[1] + rest[3 * k + 2] * v[2];
  basis_vjp(in.degree, dir[0], dir[1], dir[2], v_basis, v_dir);
  const float along = v_dir[0] * dir[0] + v_dir[1] * dir[1] + v_dir[2] * dir[2];
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
  std::vector<float> partial(chunks * in.cameras * 3, 0.f);
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; chunk++) {
      const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
      std::fill(out.sh0 + 3 * begin, out.sh0 + 3 * end, 0.f);
      std::fill(out.means + 3 * begin, out.means + 3 * end, 0.f);
      if (out.shN) std::fill(out.shN + 3 * in.stored * begin, out.shN + 3 * in.stored * end, 0.f);
      for (int c = 0; c < in.cameras; c++) {
        float center[3];
        in.center(c, center);
        for (int64_t i = begin; i < end; i++)
          backward_one(in, c, i, center, colors, v_colors, out, &partial[(chunk * in.cameras + c) * 3]);
      }
    }
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
