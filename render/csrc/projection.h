// The projection of a 3D Gaussian and its gradient, over a number type T: one float, or W of them.
#pragma once
#include "constants.h"
#include "simd.h"

namespace pf {

// A pinhole camera; limits are the tangents beyond which the projection is not linearised.
struct Camera {
  float R[9], t[3], fx, fy, cx, cy, min_x, max_x, min_y, max_y;

  Camera(const float *viewmat, const float *K, float width, float height) : fx(K[0]), fy(K[4]), cx(K[2]), cy(K[5]) {
    for (int i = 0; i < 3; i++) {
      for (int j = 0; j < 3; j++) R[3 * i + j] = viewmat[4 * i + j];
      t[i] = viewmat[4 * i + 3];
    }
    min_x = -cx / fx - kViewMargin * width / fx, max_x = (width - cx) / fx + kViewMargin * width / fx;
    min_y = -cy / fy - kViewMargin * height / fy, max_y = (height - cy) / fy + kViewMargin * height / fy;
  }
  template <class T>
  PF_INLINE T to_camera(const T *world, int row) const {
    return R[3 * row] * world[0] + R[3 * row + 1] * world[1] + R[3 * row + 2] * world[2] + t[row];
  }
};

template <class T>
struct Gaussian3D {
  T mean[3], quat[4], scale[3], opacity;
};

// Everything between a Gaussian and its screen parameters; `forward` fills it, `backward` walks it in reverse.
template <class T>
struct Projection {
  T w, x, y, z, inv_norm;  // unit quaternion, and 1 / length of the stored one
  T rot[9];                // its rotation
  T axes[9];               // columns: principal axes in the world, scaled
  T view[9];               // the same in the camera
  T px, py, pz, inv_z, tan_x, tan_y, clamped_x, clamped_y;
  T jx, jxz, jy, jyz;      // Jacobian rows (jx, 0, jxz) and (0, jy, jyz)
  T u[3], v[3];            // projected axes
  T n[3];  // u x v: its square is the determinant without the blur, with no difference of large products
  T var_x, covar, var_y, det, sharp_det, added_det, mass;

  PF_INLINE void forward(const Camera &cam, const Gaussian3D<T> &g, bool antialiased) {
    inv_norm = T{} + 1.f;
    inv_norm =
        inv_norm / sqrt(g.quat[0] * g.quat[0] + g.quat[1] * g.quat[1] + g.quat[2] * g.quat[2] + g.quat[3] * g.quat[3]);
    w = g.quat[0] * inv_norm, x = g.quat[1] * inv_norm, y = g.quat[2] * inv_norm, z = g.quat[3] * inv_norm;
    rot[0] = 1.f - 2.f * (y * y + z * z), rot[1] = 2.f * (x * y - w * z), rot[2] = 2.f * (x * z + w * y);
    rot[3] = 2.f * (x * y + w * z), rot[4] = 1.f - 2.f * (x * x + z * z), rot[5] = 2.f * (y * z - w * x);
    rot[6] = 2.f * (x * z - w * y), rot[7] = 2.f * (y * z + w * x), rot[8] = 1.f - 2.f * (x * x + y * y);
    for (int i = 0; i < 3; i++)
      for (int k = 0; k < 3; k++) axes[3 * i + k] = rot[3 * i + k] * g.scale[k];
    for (int i = 0; i < 3; i++)
      for (int k = 0; k < 3; k++)
        view[3 * i + k] = cam.R[3 * i] * axes[k] + cam.R[3 * i + 1] * axes[3 + k] + cam.R[3 * i + 2] * axes[6 + k];
    px = cam.to_camera(g.mean, 0), py = cam.to_camera(g.mean, 1), pz = cam.to_camera(g.mean, 2);
    inv_z = 1.f / pz;
    tan_x = px * inv_z, tan_y = py * inv_z;
    clamped_x = min(max(tan_x, T{} + cam.min_x), T{} + cam.max_x);
    clamped_y = min(max(tan_y, T{} + cam.min_y), T{} + cam.max_y);
    jx = cam.fx * inv_z, jxz = -jx * clamped_x, jy = cam.fy * inv_z, jyz = -jy * clamped_y;
    for (int k = 0; k < 3; k++) {
      u[k] = jx * view[k] + jxz * view[6 + k];
      v[k] = jy * view[3 + k] + jyz * view[6 + k];
    }
    const T a = u[0] * u[0] + u[1] * u[1] + u[2] * u[2], c = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
    covar = u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
    var_x = a + kBlur, var_y = c + kBlur;
    n[0] = u[1] * v[2] - u[2] * v[1], n[1] = u[2] * v[0] - u[0] * v[2], n[2] = u[0] * v[1] - u[1] * v[0];
    sharp_det = n[0] * n[0] + n[1] * n[1] + n[2] * n[2];
    added_det = kBlur * (a + c) + kBlur * kBlur;
    det = sharp_det + added_det;
    mass = g.opacity;
    if (antialiased) mass = mass * sqrt(max(sharp_det / det, T{} + 1e-12f));
  }

  PF_INLINE T mean_x(const Camera &cam) const { return cam.fx * tan_x + cam.cx; }
  PF_INLINE T mean_y(const Camera &cam) const { return cam.fy * tan_y + cam.cy; }

  // Gradients of the Gaussian (into `out`) and of the camera's [R | t] (into `v_view`, 3x4), from those of the screen
  // parameters (x, y, a, b, c, log_opacity) and of the depth.
  PF_INLINE void backward(const Camera &cam, const Gaussian3D<T> &g, bool antialiased, const T *v_params, T v_depth,
                          Gaussian3D<T> &out, T *v_view) const {
    // Conic: d(inverse) = -inverse d inverse, with inverse * (u, v) in a form that does not cancel for needles.
    const T inv_det = 1.f / det, a = var_y * inv_det, b = -covar * inv_det, c = var_x * inv_det,
            half = 0.5f * v_params[3];
    T v_sharp{}, v_added{};  // what 1/2 log(sharp_det / det) makes of the two parts of det
    out.opacity = v_params[5] / g.opacity;
    if (antialiased) {
      const T scale = select(lt(T{} + 1e-12f * det, sharp_det), v_params[5] * inv_det, T{});
      v_sharp = scale * added_det / max(sharp_det, T{} + 1e-30f), v_added = -kBlur * scale;
    }
    T v_u[3], v_v[3], v_jx = T{}, v_jxz = T{}, v_jy = T{}, v_jyz = T{};
    for (int k = 0; k < 3; k++) {
      const int k1 = (k + 1) % 3, k2 = (k + 2) % 3;
      const T v_n = v[k1] * n[k2] - v[k2] * n[k1], n_u = n[k1] * u[k2] - n[k2] * u[k1];  // v x n and n x u
      const T p = (v_n + kBlur * u[k]) * inv_det, q = (n_u + kBlur * v[k]) * inv_det;
      const T v_p = -2.f * (v_params[2] * p + half * q), v_q = -2.f * (half * p + v_params[4] * q);
      v_u[k] = a * v_p + b * v_q + v_sharp * v_n + v_added * u[k];
      v_v[k] = b * v_p + c * v_q + v_sharp * n_u + v_added * v[k];
      v_jx += view[k] * v_u[k], v_jxz += view[6 + k] * v_u[k];
      v_jy += view[3 + k] * v_v[k], v_jyz += view[6 + k] * v_v[k];
    }
    // Position in the camera: through the mean, and through the Jacobian. A clamped tangent carries no gradient.
    const T inside_x = select(le(clamped_x, tan_x), select(le(tan_x, clamped_x), T{} + 1.f, T{}), T{});
    const T inside_y = select(le(clamped_y, tan_y), select(le(tan_y, clamped_y), T{} + 1.f, T{}), T{});
    const T v_px = jx * v_params[0] - jx * inv_z * inside_x * v_jxz;
    const T v_py = jy * v_params[1] - jy * inv_z * inside_y * v_jyz;
    const T v_pz = v_depth - jx * tan_x * v_params[0] - jy * tan_y * v_params[1] - jx * inv_z * v_jx -
                   jy * inv_z * v_jy - jxz * inv_z * (1.f + inside_x) * v_jxz - jyz * inv_z * (1.f + inside_y) * v_jyz;
    // Axes in the camera, then in the world.
    T v_axes[9], v_camera_axes[9];
    for (int k = 0; k < 3; k++) {
      v_camera_axes[k] = jx * v_u[k];
      v_camera_axes[3 + k] = jy * v_v[k];
      v_camera_axes[6 + k] = jxz * v_u[k] + jyz * v_v[k];
    }
    for (int j = 0; j < 3; j++) {
      out.mean[j] = cam.R[j] * v_px + cam.R[3 + j] * v_py + cam.R[6 + j] * v_pz;
      for (int k = 0; k < 3; k++)
        v_axes[3 * j + k] =
            cam.R[j] * v_camera_axes[k] + cam.R[3 + j] * v_camera_axes[3 + k] + cam.R[6 + j] * v_camera_axes[6 + k];
    }
    if (v_view) {
      const T v_position[3] = {v_px, v_py, v_pz};
      for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++)
          v_view[4 * i + j] = v_position[i] * g.mean[j] + v_camera_axes[3 * i] * axes[3 * j] +
                              v_camera_axes[3 * i + 1] * axes[3 * j + 1] + v_camera_axes[3 * i + 2] * axes[3 * j + 2];
        v_view[4 * i + 3] = v_position[i];
      }
    }
    for (int k = 0; k < 3; k++)
      out.scale[k] = rot[k] * v_axes[k] + rot[3 + k] * v_axes[3 + k] + rot[6 + k] * v_axes[6 + k];
    T d[9];
    for (int j = 0; j < 3; j++)
      for (int k = 0; k < 3; k++) d[3 * j + k] = v_axes[3 * j + k] * g.scale[k];
    const T v_w = 2.f * (x * (d[7] - d[5]) + y * (d[2] - d[6]) + z * (d[3] - d[1]));
    const T v_x = 2.f * (w * (d[7] - d[5]) + y * (d[1] + d[3]) + z * (d[2] + d[6]) - 2.f * x * (d[4] + d[8]));
    const T v_y = 2.f * (w * (d[2] - d[6]) + x * (d[1] + d[3]) + z * (d[5] + d[7]) - 2.f * y * (d[0] + d[8]));
    const T v_z = 2.f * (w * (d[3] - d[1]) + x * (d[2] + d[6]) + y * (d[5] + d[7]) - 2.f * z * (d[0] + d[4]));
    const T along = v_w * w + v_x * x + v_y * y + v_z * z;  // normalising takes the radial part out
    out.quat[0] = (v_w - along * w) * inv_norm, out.quat[1] = (v_x - along * x) * inv_norm;
    out.quat[2] = (v_y - along * y) * inv_norm, out.quat[3] = (v_z - along * z) * inv_norm;
  }
};

}  // namespace pf
