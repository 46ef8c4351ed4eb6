// Projection of W Gaussians at a time, forward and backward.
#include <algorithm>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "columns.h"
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

  int filled(int64_t first) const { return static_cast<int>(std::min<int64_t>(W, count - first)); }
  // W Gaussians from `first` on; those beyond the end are zero.
  PF_INLINE Gaussian3D<vf> load_block(int64_t first) const {
    Gaussian3D<vf> g;
    load_columns<3>(means + 3 * first, filled(first), g.mean);
    load_columns<4>(quats + 4 * first, filled(first), g.quat);
    load_columns<3>(scales + 3 * first, filled(first), g.scale);
    g.opacity = load_some(opacities + first, filled(first));
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
  vf screen[kParams] = {x, y, p.var_y * inv_det, -p.covar * inv_det, p.var_x * inv_det, log_opacity};
  for (vf &field : screen) field = keep(drawn, field);
  const vf radius[2] = {keep(drawn, radius_x), keep(drawn, radius_y)};
  const int filled = in.filled(first);
  store_columns<kParams>(params + kParams * first, filled, screen);
  store_columns<2>(radii + 2 * first, filled, radius);
  store_some(depths + first, keep(drawn, p.pz), filled);
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

struct Upstream {
  const float *radii, *v_params, *v_depths;
};

// Adds to `sum` what the block of Gaussians `g` gets from one camera; `v_view` [12], if wanted, collects the camera's.
PF_INLINE void backward_block(const Inputs &in, const Camera &cam, const Gaussian3D<vf> &g, int64_t first,
                              const Upstream &up, Gaussian3D<vf> &sum, vf *v_view) {
  const int filled = in.filled(first);
  vf radius[2], v_params[kParams], v_block[12];
  load_columns<2>(up.radii + 2 * first, filled, radius);
  const vm drawn = lt(vf{}, radius[0]);
  if (!any(drawn)) return;
  load_columns<kParams>(up.v_params + kParams * first, filled, v_params);
  for (vf &v : v_params) v = keep(drawn, v);
  Projection<vf> p;
  p.forward(cam, g, in.antialiased);
  Gaussian3D<vf> v;
  p.backward(cam, g, in.antialiased, v_params, keep(drawn, load_some(up.v_depths + first, filled)), v,
             v_view ? v_block : nullptr);
  if (v_view)
    for (int k = 0; k < 12; k++) v_view[k] += keep(drawn, v_block[k]);
  for (int k = 0; k < 3; k++) sum.mean[k] += keep(drawn, v.mean[k]), sum.scale[k] += keep(drawn, v.scale[k]);
  for (int k = 0; k < 4; k++) sum.quat[k] += keep(drawn, v.quat[k]);
  sum.opacity += keep(drawn, v.opacity);
}

void project_backward(Floats means, Floats quats, Floats scales, Floats opacities, Floats viewmats, Floats Ks,
                      int width, int height, bool antialiased, Floats radii, Floats v_params, Floats v_depths,
                      bool camera_gradient, Floats v_means, Floats v_quats, Floats v_scales, Floats v_opacities,
                      Floats v_viewmats) {
  const Inputs in = make_inputs(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased);
  const Upstream all{radii.data(), v_params.data(), v_depths.data()};
  float *out_means = v_means.data(), *out_quats = v_quats.data(), *out_scales = v_scales.data();
  float *out_opacities = v_opacities.data(), *v_cameras = v_viewmats.data();
  nb::gil_scoped_release unlocked;
  std::vector<Camera> cameras;
  std::vector<Upstream> upstream;
  for (int c = 0; c < in.cameras; c++) {
    const int64_t base = c * in.count;
    cameras.push_back(in.camera(c));
    upstream.push_back({all.radii + 2 * base, all.v_params + kParams * base, all.v_depths + base});
  }
  const int64_t chunks = (in.count + kGrain - 1) / kGrain;
  std::vector<float> partial(camera_gradient ? chunks * in.cameras * 12 : 0, 0.f);
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; chunk++) {
      const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
      std::vector<vf> v_views(camera_gradient ? in.cameras * 12 : 0, vf{});
      for (int64_t first = begin; first < end; first += W) {
        const Gaussian3D<vf> g = in.load_block(first);
        Gaussian3D<vf> v{};
        for (int c = 0; c < in.cameras; c++)
          backward_block(in, cameras[c], g, first, upstream[c], v, camera_gradient ? &v_views[12 * c] : nullptr);
        const int filled = in.filled(first);
        store_columns<3>(out_means + 3 * first, filled, v.mean);
        store_columns<4>(out_quats + 4 * first, filled, v.quat);
        store_columns<3>(out_scales + 3 * first, filled, v.scale);
        store_some(out_opacities + first, v.opacity, filled);
      }
      for (size_t k = 0; k < v_views.size(); k++) partial[chunk * in.cameras * 12 + k] = sum(v_views[k]);
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
