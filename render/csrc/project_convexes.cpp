// Projection of W convexes at a time, forward and backward: K points, their hull in the image, and its footprint.
#include <algorithm>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "hull.h"
#include "parallel.h"
#include "projection.h"

namespace pf {
namespace {

constexpr int64_t kGrain = 1024;
constexpr float kMaxExtent = 1e6f, kMinThickness = 1e-6f;  // MAX_EXTENT and MIN_THICKNESS of ops/project_convexes.py

// Between rows of `width` floats and vectors of W rows' first, second, ... floats; 0 in lanes beyond the rows.
PF_INLINE void load_rows(const float *p, int rows, int width, vf *columns) {
  for (int k = 0; k < width; k++) columns[k] = vf{};
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < width; k++) columns[k][row] = p[row * width + k];
}
PF_INLINE void store_rows(float *p, int rows, int width, const vf *columns) {
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < width; k++) p[row * width + k] = columns[k][row];
}

struct Inputs {
  const float *points, *deltas, *sigmas, *opacities, *viewmats, *Ks;
  int64_t count;
  int cameras, width, height;

  Camera camera(int c) const { return Camera(viewmats + 16 * c, Ks + 9 * c, width, height); }
  int filled(int64_t first) const { return static_cast<int>(std::min<int64_t>(W, count - first)); }
};

template <int K>
struct Convexes {
  vf points[3 * K], delta, sigma, opacity;

  PF_INLINE Convexes(const Inputs &in, int64_t first) {
    const int rows = in.filled(first);
    load_rows(in.points + first * 3 * K, rows, 3 * K, points);
    delta = load_some(in.deltas + first, rows), sigma = load_some(in.sigmas + first, rows);
    opacity = load_some(in.opacities + first, rows);
  }
};

// The points in one camera and on its image.
template <int K>
struct Screen {
  vf x[K], y[K], z[K], inv_z[K];          // camera
  vf px[K], py[K];                        // pixels, relative to the centre
  vf center_x, center_y, mean_z, focal;

  PF_INLINE Screen(const Camera &cam, const Convexes<K> &convexes) {
    center_x = center_y = mean_z = vf{};
    for (int k = 0; k < K; k++) {
      const vf *world = convexes.points + 3 * k;
      x[k] = cam.to_camera(world, 0), y[k] = cam.to_camera(world, 1), z[k] = cam.to_camera(world, 2);
      inv_z[k] = 1.f / z[k];
      px[k] = cam.fx * x[k] * inv_z[k] + cam.cx, py[k] = cam.fy * y[k] * inv_z[k] + cam.cy;
      center_x += px[k], center_y += py[k], mean_z += z[k];
    }
    center_x *= 1.f / K, center_y *= 1.f / K, mean_z *= 1.f / K;
    for (int k = 0; k < K; k++) px[k] -= center_x, py[k] -= center_y;
    focal = broadcast(std::sqrt(cam.fx * cam.fy));
  }
};

// How far the outline of csrc/convex.h reaches from the centre, and whether the hull has an inside at all.
template <int K>
struct Reach {
  vf low_x, high_x, low_y, high_y;
  vm solid;

  PF_INLINE Reach(const Hull<K> &hull, vf margin) {
    vf normal_x[K], normal_y[K], last_x{}, last_y{}, doubled_area{}, perimeter{};
    vm exists[K];
    for (int i = 0; i < K; i++) {
      const int next = (i + 1) % K;
      const vf ex = hull.x[next] - hull.x[i], ey = hull.y[next] - hull.y[i], squared = ex * ex + ey * ey;
      exists[i] = lt(vf{}, squared);
      const vf length = sqrt(squared), inverse = 1.f / select(exists[i], length, broadcast(1.f));
      normal_x[i] = ey * inverse, normal_y[i] = -ex * inverse;
      last_x = select(exists[i], normal_x[i], last_x), last_y = select(exists[i], normal_y[i], last_y);
      doubled_area += hull.x[i] * hull.y[next] - hull.y[i] * hull.x[next], perimeter += length;
    }
    solid = both(lt(broadcast(2.5f), hull.corners), lt(2.f * kMinThickness * perimeter * perimeter, doubled_area));
    low_x = low_y = broadcast(1e30f), high_x = high_y = broadcast(-1e30f);
    for (int i = 0; i < K; i++) {
      const vf before_x = i ? normal_x[i - 1] : last_x, before_y = i ? normal_y[i - 1] : last_y;
      const vf cosine = 1.f + before_x * normal_x[i] + before_y * normal_y[i];
      const vf shift = margin / max(cosine, broadcast(1e-12f));
      const vf x = hull.x[i] + shift * (before_x + normal_x[i]), y = hull.y[i] + shift * (before_y + normal_y[i]);
      low_x = select(exists[i], min(low_x, x), low_x), high_x = select(exists[i], max(high_x, x), high_x);
      low_y = select(exists[i], min(low_y, y), low_y), high_y = select(exists[i], max(high_y, y), high_y);
    }
  }
};

template <int K, int Room>
void forward_block(const Inputs &in, const Camera &cam, int64_t first, float *params, float *depths, float *radii) {
  constexpr int kParams = 2 * Room + 5;
  const Convexes<K> convexes(in, first);
  const Screen<K> screen(cam, convexes);
  const Hull<K> hull(screen.px, screen.py);
  const vf delta = convexes.delta * screen.mean_z / screen.focal;
  const vf level = log(max(convexes.opacity * (1.f / kAlphaMin) - 1.f, broadcast(1.f)));
  const Reach<K> reach(hull, level / (convexes.sigma * delta));
  const vf radius_x = max(-reach.low_x, reach.high_x), radius_y = max(-reach.low_y, reach.high_y);
  vm drawn = both(reach.solid, lt(broadcast(kAlphaMin), convexes.opacity));
  for (int k = 0; k < K; k++) drawn = both(drawn, lt(broadcast(kNear), screen.z[k]));
  const vf x = screen.center_x, y = screen.center_y;
  drawn = both(drawn, both(lt(vf{}, x + reach.high_x), lt(x + reach.low_x, broadcast(in.width))));
  drawn = both(drawn, both(lt(vf{}, y + reach.high_y), lt(y + reach.low_y, broadcast(in.height))));
  // Phrased so that NaN fails them
  drawn = both(drawn, both(lt(abs(x) + radius_x, broadcast(kMaxExtent)), lt(abs(y) + radius_y, broadcast(kMaxExtent))));
  drawn = both(drawn, both(lt(delta, broadcast(1e30f)), lt(convexes.sigma, broadcast(1e30f))));
  vf out[kParams];
  out[0] = x, out[1] = y;
  for (int slot = 0; slot < Room; slot++) {
    const int corner = slot < K ? slot : 0;
    out[2 + 2 * slot] = hull.x[corner], out[3 + 2 * slot] = hull.y[corner];
  }
  out[2 * Room + 2] = delta, out[2 * Room + 3] = convexes.sigma, out[2 * Room + 4] = convexes.opacity;
  for (vf &field : out) field = keep(drawn, field);
  const vf radius[2] = {keep(drawn, radius_x), keep(drawn, radius_y)};
  const int rows = in.filled(first);
  store_rows(params + first * kParams, rows, kParams, out);
  store_rows(radii + first * 2, rows, 2, radius);
  store_some(depths + first, keep(drawn, screen.mean_z), rows);
}

struct Upstream {
  const float *radii, *v_params, *v_depths;
};

template <int K>
struct Gradients {
  vf points[3 * K], delta, sigma, opacity;
};

// Adds to `sum` what a block of convexes gets from one camera; `v_view` [12], if wanted, collects the camera's.
template <int K, int Room>
void backward_block(const Inputs &in, const Camera &cam, const Convexes<K> &convexes, int64_t first, const Upstream &up,
                    Gradients<K> &sum, vf *v_view) {
  constexpr int kParams = 2 * Room + 5;
  const int rows = in.filled(first);
  vf radius[2], v[kParams];
  load_rows(up.radii + first * 2, rows, 2, radius);
  const vm drawn = lt(vf{}, radius[0]);
  if (!any(drawn)) return;
  load_rows(up.v_params + first * kParams, rows, kParams, v);
  for (vf &field : v) field = keep(drawn, field);
  const Screen<K> screen(cam, convexes);
  const Hull<K> hull(screen.px, screen.py);
  vf v_x = v[0], v_y = v[1];  // of the centre: corners are relative to it
  for (int slot = 0; slot < Room; slot++) v_x -= v[2 + 2 * slot], v_y -= v[3 + 2 * slot];
  const vf v_delta = v[2 * Room + 2];
  sum.delta += keep(drawn, v_delta * screen.mean_z / screen.focal);
  sum.sigma += v[2 * Room + 3], sum.opacity += v[2 * Room + 4];
  const vf v_mean_z = v_delta * convexes.delta / screen.focal + keep(drawn, load_some(up.v_depths + first, rows));
  for (int k = 0; k < K; k++) {
    vf v_px = v_x * (1.f / K), v_py = v_y * (1.f / K);
    for (int slot = 0; slot < Room; slot++) {
      const vf from = hull.from[slot < K ? slot : 0];
      const vm mine = both(le(from, broadcast(k)), le(broadcast(k), from));
      v_px += keep(mine, v[2 + 2 * slot]), v_py += keep(mine, v[3 + 2 * slot]);
    }
    const vf v_cx = v_px * cam.fx * screen.inv_z[k], v_cy = v_py * cam.fy * screen.inv_z[k];
    const vf v_cz = v_mean_z * (1.f / K) - (v_cx * screen.x[k] + v_cy * screen.y[k]) * screen.inv_z[k];
    const vf v_camera[3] = {keep(drawn, v_cx), keep(drawn, v_cy), keep(drawn, v_cz)};
    for (int axis = 0; axis < 3; axis++)
      for (int row = 0; row < 3; row++) sum.points[3 * k + axis] += cam.R[3 * row + axis] * v_camera[row];
    if (!v_view) continue;
    for (int row = 0; row < 3; row++) {
      for (int axis = 0; axis < 3; axis++) v_view[4 * row + axis] += v_camera[row] * convexes.points[3 * k + axis];
      v_view[4 * row + 3] += v_camera[row];
    }
  }
}

// Calls visit<K, Room>() for the number of points a convex has.
template <int K = 3, class Visit>
void with_points(int64_t points, Visit visit) {
  if (points == K) return visit.template operator()<K, (K <= 6 ? 6 : 12)>();
  if constexpr (K < 12) with_points<K + 1>(points, visit);
}

Inputs make_inputs(Floats points, Floats deltas, Floats sigmas, Floats opacities, Floats viewmats, Floats Ks, int width,
                   int height) {
  return {points.data(),
          deltas.data(),
          sigmas.data(),
          opacities.data(),
          viewmats.data(),
          Ks.data(),
          static_cast<int64_t>(points.shape(0)),
          static_cast<int>(viewmats.shape(0)),
          width,
          height};
}

void project_convexes_forward(Floats points, Floats deltas, Floats sigmas, Floats opacities, Floats viewmats, Floats Ks,
                              int width, int height, Floats params, Floats depths, Floats radii) {
  const Inputs in = make_inputs(points, deltas, sigmas, opacities, viewmats, Ks, width, height);
  float *out_params = params.data(), *out_depths = depths.data(), *out_radii = radii.data();
  const int64_t length = params.shape(2), per_convex = points.shape(1);
  nb::gil_scoped_release unlocked;
  with_points(per_convex, [&]<int K, int Room>() {
    for (int c = 0; c < in.cameras; c++) {
      const Camera cam = in.camera(c);
      const int64_t base = c * in.count;
      parallel_for(in.count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += W)
          forward_block<K, Room>(in, cam, first, out_params + base * length, out_depths + base, out_radii + 2 * base);
      });
    }
  });
}

void project_convexes_backward(Floats points, Floats deltas, Floats sigmas, Floats opacities, Floats viewmats,
                               Floats Ks, int width, int height, Floats radii, Floats v_params, Floats v_depths,
                               bool camera_gradient, Floats v_points, Floats v_deltas, Floats v_sigmas,
                               Floats v_opacities, Floats v_viewmats) {
  const Inputs in = make_inputs(points, deltas, sigmas, opacities, viewmats, Ks, width, height);
  float *out_points = v_points.data(), *out_deltas = v_deltas.data(), *out_sigmas = v_sigmas.data();
  float *out_opacities = v_opacities.data(), *v_cameras = v_viewmats.data();
  const int64_t length = v_params.shape(2), per_convex = points.shape(1);
  std::vector<Camera> cameras;
  std::vector<Upstream> upstream;
  for (int c = 0; c < in.cameras; c++) {
    const int64_t base = c * in.count;
    cameras.push_back(in.camera(c));
    upstream.push_back({radii.data() + 2 * base, v_params.data() + length * base, v_depths.data() + base});
  }
  nb::gil_scoped_release unlocked;
  const int64_t chunks = (in.count + kGrain - 1) / kGrain;
  std::vector<float> partial(camera_gradient ? chunks * in.cameras * 12 : 0, 0.f);
  with_points(per_convex, [&]<int K, int Room>() {
    parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
      for (; chunk < last; chunk++) {
        const int64_t begin = chunk * kGrain, end = std::min(begin + kGrain, in.count);
        std::vector<vf> v_views(camera_gradient ? in.cameras * 12 : 0, vf{});
        for (int64_t first = begin; first < end; first += W) {
          const Convexes<K> convexes(in, first);
          Gradients<K> v{};
          for (int c = 0; c < in.cameras; c++)
            backward_block<K, Room>(in, cameras[c], convexes, first, upstream[c], v,
                                    camera_gradient ? &v_views[12 * c] : nullptr);
          const int rows = in.filled(first);
          store_rows(out_points + first * 3 * K, rows, 3 * K, v.points);
          store_some(out_deltas + first, v.delta, rows);
          store_some(out_sigmas + first, v.sigma, rows);
          store_some(out_opacities + first, v.opacity, rows);
        }
        for (size_t k = 0; k < v_views.size(); k++) partial[chunk * in.cameras * 12 + k] = sum(v_views[k]);
      }
    });
  });
  for (int64_t i = 0; i < static_cast<int64_t>(partial.size()); i++)  // in a fixed order: the same sum every time
    v_cameras[i / 12 % in.cameras * 16 + i % 12] += partial[i];
}

}  // namespace

void bind_project_convexes(nb::module_ &m) {
  m.attr("MAX_EXTENT") = kMaxExtent, m.attr("MIN_THICKNESS") = kMinThickness;
  m.def("project_convexes_forward", &project_convexes_forward);
  m.def("project_convexes_backward", &project_convexes_backward);
}

}  // namespace pf
