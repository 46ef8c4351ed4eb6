// Projection of W Gaussians at a time, forward and backward.
#include <algorithm>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "projection.h"

namespace pf {
namespace {

constexpr int kParams = 6;
constexpr int64_t kGrain = 4096;

struct Inputs {
  const float *means, *quats, *scales, *opacities, *viewmats, *Ks;
  int64_t count;
  int cameras, width, height;
  bool antialiased;

  Camera camera(int c) const { return Camera(viewmats + 16 * c, Ks + 9 * c, width, height); }

  // W Gaussians from `first` on; beyond the end the last one is repeated.
  PF_INLINE Gaussian3D<vf> load_block(int64_t first) const {
    alignas(64) float lanes[11][W];
    for (int lane = 0; lane < W; lane++) {
      const int64_t i = std::min(first + lane, count - 1);
      for (int d = 0; d < 3; d++) lanes[d][lane] = means[3 * i + d];
      for (int d = 0; d < 4; d++) lanes[3 + d][lane] = quats[4 * i + d];
      for (int d = 0; d < 3; d++) lanes[7 + d][lane] = scales[3 * i + d];
      lanes[10][lane] = opacities[i];
    }
    Gaussian3D<vf> g;
    for (int d = 0; d < 3; d++) g.mean[d] = load(lanes[d]), g.scale[d] = load(lanes[7 + d]);
    for (int d = 0; d < 4; d++) g.quat[d] = load(lanes[3 + d]);
    g.opacity = load(lanes[10]);
    return g;
  }
};

Inputs make_inputs(Floats means, Floats quats, Floats scales, Floats opacities, Floats viewmats, Floats Ks, int width,
                   int height, bool antialiased) {
  return {means.data(),
          quats.data(),
          scales.data(),
          opacities.data(),
          viewmats.data(),
          Ks.data(),
          static_cast<int64_t>(means.shape(0)),
          static_cast<int>(viewmats.shape(0)),
          width,
          height,
          antialiased};
}

void forward_block(const Inputs &in, const Camera &cam, int64_t first, float *params, float *depths, float *radii) {
  Projection<vf> p;
  p.forward(cam, in.load_block(first), in.antialiased);
  const vf inv_det = 1.f / p.det, x = p.mean_x(cam), y = p.mean_y(cam);
  const vm solid = both(lt(broadcast(kAlphaMin), p.mass), both(lt(broadcast(kNear), p.pz), lt(vf{}, p.det)));
  const vf log_opacity = log(select(solid, p.mass, broadcast(1.f))), level = 2.f * (log_opacity - kLogAlphaMin);
  const vf radius_x = sqrt(level * p.var_x), radius_y = sqrt(level * p.var_y);
  const vm on_screen_x = both(lt(vf{}, x + radius_x), lt(x - radius_x, broadcast(in.width)));
  const vm on_screen_y = both(lt(vf{}, y + radius_y), lt(y - radius_y, broadcast(in.height)));
  // Comparisons are phrased so that NaN fails them; an infinite variance fails the last.
  const vm finite = both(lt(p.var_x + p.var_y, broadcast(1e18f)), lt(abs(x) + abs(y), broadcast(1e18f)));
  const vm drawn = both(both(solid, finite), both(on_screen_x, on_screen_y));
  const vf fields[9] = {x,    y,        p.var_y * inv_det, -p.covar * inv_det, p.var_x * inv_det, log_opacity,
                        p.pz, radius_x, radius_y};
  alignas(64) float lanes[9][W];
  for (int k = 0; k < 9; k++) store(lanes[k], keep(drawn, fields[k]));
  const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
  for (int lane = 0; lane < filled; lane++) {
    for (int k = 0; k < kParams; k++) params[(first + lane) * kParams + k] = lanes[k][lane];
    depths[first + lane] = lanes[6][lane];
    radii[2 * (first + lane)] = lanes[7][lane], radii[2 * (first + lane) + 1] = lanes[8][lane];
  }
}

void project_forward(Floats means, Floats quats, Floats scales, Floats opacities, Floats viewmats, Floats Ks, int width,
                     int height, bool antialiased, Floats params, Floats depths, Floats radii) {
  const Inputs in = make_inputs(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased);
  float *out_params = params.data(), *out_depths = depths.data(), *out_radii = radii.data();
  nb::gil_scoped_release unlocked;
  for (int c = 0; c < in.cameras; c++) {
    const Camera cam = in.camera(c);
    const int64_t base = c * in.count;
    parallel_for(in.count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += W)
        forward_block(in, cam, first, out_params + base * kParams, out_depths + base, out_radii + 2 * base);
    });
  }
}

struct Gradients {
  float *means, *quats, *scales, *opacities;
  void zero(int64_t i) const {
    std::fill(means + 3 * i, means + 3 * i + 3, 0.f);
    std::fill(quats + 4 * i, quats + 4 * i + 4, 0.f);
    std::fill(scales + 3 * i, scales + 3 * i + 3, 0.f);
    opacities[i] = 0.f;
  }
};

struct Upstream {
  const float *radii, *v_params, *v_depths;
};

// Adds the gradients of one block; `v_view` [12][W] collects the camera's.
void backward_block(const Inputs &in, const Camera &cam, int64_t first, const Upstream &up, const Gradients &out,
                    vf *v_view) {
  const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
  alignas(64) float lanes[11][W] = {}, drawn[W] = {};
  bool any_drawn = false;
  for (int lane = 0; lane < filled; lane++) {
    const int64_t i = first + lane;
    if (!(up.radii[2 * i] > 0.f)) continue;
    any_drawn = true, drawn[lane] = 1.f;
    for (int k = 0; k < kParams; k++) lanes[k][lane] = up.v_params[kParams * i + k];
    lanes[6][lane] = up.v_depths[i];
  }
  if (!any_drawn) return;
  vf v_params[kParams];
  for (int k = 0; k < kParams; k++) v_params[k] = load(lanes[k]);
  const Gaussian3D<vf> g = in.load_block(first);
  Projection<vf> p;
  p.forward(cam, g, in.antialiased);
  Gaussian3D<vf> v;
  vf v_block[12];
  p.backward(cam, g, in.antialiased, v_params, load(lanes[6]), v, v_view ? v_block : nullptr);
  const vm counts = lt(vf{}, load(drawn));
  if (v_view)
    for (int k = 0; k < 12; k++) v_view[k] += keep(counts, v_block[k]);
  const vf fields[11] = {v.mean[0], v.mean[1],  v.mean[2],  v.quat[0],  v.quat[1], v.quat[2],
                         v.quat[3], v.scale[0], v.scale[1], v.scale[2], v.opacity};
  for (int k = 0; k < 11; k++) store(lanes[k], keep(counts, fields[k]));
  for (int lane = 0; lane < filled; lane++) {
    const int64_t i = first + lane;
    for (int d = 0; d < 3; d++) out.means[3 * i + d] += lanes[d][lane], out.scales[3 * i + d] += lanes[7 + d][lane];
    for (int d = 0; d < 4; d++) out.quats[4 * i + d] += lanes[3 + d][lane];
    out.opacities[i] += lanes[10][lane];
  }
}

void project_backward(Floats means, Floats quats, Floats scales, Floats opacities, Floats viewmats, Floats Ks,
                      int width, int height, bool antialiased, Floats radii, Floats v_params, Floats v_depths,
                      bool camera_gradient, Floats v_means, Floats v_quats, Floats v_scales, Floats v_opacities,
                      Floats v_viewmats) {
  const Inputs in = make_inputs(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased);
  const Upstream all{radii.data(), v_params.data(), v_depths.data()};
  const Gradients out{v_means.data(), v_quats.data(), v_scales.data(), v_opacities.data()};
  float *v_cameras = v_viewmats.data();
  nb::gil_scoped_release unlocked;
  const int64_t chunks = (in.count + kGrain - 1) / kGrain;
  std::vector<float> partial(camera_gradient ? chunks * in.cameras * 12 : 0, 0.f);
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; chunk++) {
      const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
      for (int64_t i = begin; i < end; i++) out.zero(i);
      for (int c = 0; c < in.cameras; c++) {
        const int64_t base = c * in.count;
        const Upstream up{all.radii + 2 * base, all.v_params + kParams * base, all.v_depths + base};
        const Camera cam = in.camera(c);
        vf v_view[12] = {};
        for (int64_t first = begin; first < end; first += W)
          backward_block(in, cam, first, up, out, camera_gradient ? v_view : nullptr);
        if (camera_gradient)
          for (int k = 0; k < 12; k++) partial[(chunk * in.cameras + c) * 12 + k] = sum(v_view[k]);
      }
    }
  });
  for (int64_t i = 0; i < static_cast<int64_t>(partial.size()); i++)  // in a fixed order: the same sum every time
    v_cameras[i / 12 % in.cameras * 16 + i % 12] += partial[i];
}

}  // namespace

void bind_project(nb::module_ &m) {
  m.def("project_forward", &project_forward);
  m.def("project_backward", &project_backward);
}

}  // namespace pf
