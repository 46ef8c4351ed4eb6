// Multiresolution grids of trainable features, interpolated: cubes with 2^D corners, or simplices with D + 1.
//
// W points at a time: cells, weights and table rows in vectors, features by gathers. The gradient of a level's table is
// summed by one thread in the order of the points, so that it does not depend on how many threads there are.
#include <algorithm>
#include <cmath>
#include <string>
#include "arrays.h"
#include "bindings.h"
#include "columns.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int64_t kChunk = 2048;  // points: their gradients stay in the second cache while all levels take them
constexpr uint32_t kPrimes[4] = {1u, 2654435761u, 805459861u, 3674653429u};

typedef uint32_t vu __attribute__((vector_size(4 * W)));

PF_INLINE vf gather(const float *base, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)index, base, 4);
#else
  vf v;
  for (int lane = 0; lane < W; lane++) v[lane] = base[index[lane]];
  return v;
#endif
}
PF_INLINE vf floor_positive(vf x) { return to_float(truncate(x)); }

struct Level {
  float scale;  // cells along the unit interval
  int64_t start;  // first row of the table
  uint32_t rows;  // power of two where hashed
  uint32_t side;  // of the dense lattice; 0 where hashed
};

struct Inputs {
  const float *x, *table, *scales;
  const int64_t *starts;
  const int32_t *sides;
  int64_t count;
  int levels;
  bool smooth;

  Level level(int l) const {
    return {scales[l], starts[l], static_cast<uint32_t>(starts[l + 1] - starts[l]), static_cast<uint32_t>(sides[l])};
  }
};

// Row of the table, within the level, of lattice points.
template <int D>
PF_INLINE vi row_of(const Level &level, const vi *point) {
  vu row = (vu)point[0];
  if (level.side) {
    uint32_t stride = 1;
    for (int d = 1; d < D; d++) row += (vu)point[d] * (stride *= level.side);
  } else {
    for (int d = 1; d < D; d++) row ^= (vu)point[d] * kPrimes[d];
    row &= level.rows - 1u;
  }
  return (vi)row;
}

// The corners of the cells that W points lie in, their weights, and the weights' derivatives to the points.
template <int D>
struct Cubes {
  static constexpr int kCorners = 1 << D;
  vi cell[D];
  vf near[D], far[D], slope[D];  // weights of the lower and the upper corner along each axis

  PF_INLINE Cubes(const Level &level, const vf *x, bool smooth) {
    for (int d = 0; d < D; d++) {
      const vf position = x[d] * level.scale + 0.5f, whole = floor_positive(position), f = position - whole;
      cell[d] = truncate(whole);
      far[d] = smooth ? f * f * (3.f - 2.f * f) : f;
      slope[d] = (smooth ? 6.f * f * (1.f - f) : broadcast(1.f)) * level.scale;
      near[d] = 1.f - far[d];
    }
  }
  PF_INLINE vi row(const Level &level, int corner) const {
    vi point[D];
    for (int d = 0; d < D; d++) point[d] = cell[d] + (corner >> d & 1);
    return row_of<D>(level, point);
  }
  PF_INLINE vf weight(int corner) const {
    vf w = corner & 1 ? far[0] : near[0];
    for (int d = 1; d < D; d++) w *= corner >> d & 1 ? far[d] : near[d];
    return w;
  }
  // Adds dL/dx of a corner whose feature is worth `value`.
  PF_INLINE void to_points(int corner, vf value, vf *v_x) const {
    for (int d = 0; d < D; d++) {
      vf w = corner >> d & 1 ? slope[d] : -slope[d];
      for (int e = 0; e < D; e++)
        if (e != d) w *= corner >> e & 1 ? far[e] : near[e];
      v_x[d] += w * value;
    }
  }
};

// The simplex of each point in a lattice of simplices (arXiv:2311.15439): skewed to the integers, its corners are found
// by walking the axes in descending order of the fractional parts.
template <int D>
struct Simplices {
  static constexpr int kCorners = D + 1;
  vi cell[D];
  vi rank[D];  // place of each axis in that order
  vf sorted[D];  // the fractional parts in that order
  float scale, skew;

  PF_INLINE Simplices(const Level &level, const vf *x, bool) : scale(level.scale) {
    skew = (std::sqrt(D + 1.f) - 1.f) / D;
    vf total = x[0], f[D];
    for (int d = 1; d < D; d++) total += x[d];
    for (int d = 0; d < D; d++) {
      const vf position = (x[d] + total * skew) * level.scale + 0.5f, whole = floor_positive(position);
      cell[d] = truncate(whole), f[d] = position - whole;
    }
    for (int d = 0; d < D; d++) rank[d] = vi{}, sorted[d] = vf{};
    for (int d = 0; d < D; d++)
      for (int e = d + 1; e < D; e++) {
        const vm later = lt(f[d], f[e]);  // ties: the first axis first
        rank[d] += select(later, vi{} + 1, vi{});
        rank[e] += select(later, vi{}, vi{} + 1);
      }
    for (int d = 0; d < D; d++)
      for (int k = 0; k < D; k++) sorted[k] = select(is(rank[d], k), f[d], sorted[k]);
  }
  static PF_INLINE vm is(vi a, int k) { return but_not(lt(a, vi{} + (k + 1)), lt(a, vi{} + k)); }
  PF_INLINE vi row(const Level &level, int corner) const {
    vi point[D];
    for (int d = 0; d < D; d++) point[d] = cell[d] + select(lt(rank[d], vi{} + corner), vi{} + 1, vi{});
    return row_of<D>(level, point);
  }
  PF_INLINE vf weight(int corner) const {
    if (corner == 0) return 1.f - sorted[0];
    return corner == D ? sorted[D - 1] : sorted[corner - 1] - sorted[corner];
  }
  // d weight / d f is +1 for the axis of rank corner - 1 and -1 for that of rank corner; f_d depends on all x by the
  // skew.
  PF_INLINE void to_points(int corner, vf value, vf *v_x) const {
    const vf step = value * scale;
    for (int d = 0; d < D; d++) {
      const vf v = keep(is(rank[d], corner - 1), step) - keep(is(rank[d], corner), step);
      v_x[d] += v;
    }
    const vf shared = step * skew;  // the sum of the above, spread over all axes: 0 except at both ends
    if (corner == 0)
      for (int d = 0; d < D; d++) v_x[d] -= shared;
    else if (corner == D)
      for (int d = 0; d < D; d++) v_x[d] += shared;
  }
};

template <template <int> class Cells, int D, int F>
struct Grid {
  // Coordinates of W points from `first` on, within the unit cube.
  static PF_INLINE void points(const Inputs &in, int64_t first, int filled, vf *x) {
    load_columns<D>(in.x + D * first, filled, x);
    for (int d = 0; d < D; d++) x[d] = min(max(x[d], vf{}), broadcast(1.f));
  }

  static void forward(const Inputs &in, float *out) {
    const int row = in.levels * F;
    parallel_for((in.count + W - 1) / W, kChunk / W, [&](int64_t block, int64_t end) {
      for (; block < end; block++) {
        const int64_t first = block * W;
        const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
        vf x[D];
        points(in, first, filled, x);
        for (int l = 0; l < in.levels; l++) {
          const Level level = in.level(l);
          const Cells<D> cells(level, x, in.smooth);
          const float *table = in.table + F * level.start;
          vf features[F] = {};
          for (int corner = 0; corner < Cells<D>::kCorners; corner++) {
            const vi at = cells.row(level, corner) * F;
            const vf weight = cells.weight(corner);
            for (int f = 0; f < F; f++) features[f] += weight * gather(table + f, at);
          }
          for (int f = 0; f < F; f++)
            for (int lane = 0; lane < filled; lane++) out[(first + lane) * row + l * F + f] = features[f][lane];
        }
      }
    });
  }

  static void to_table(const Inputs &in, const float *v_out, float *v_table) {
    const int row = in.levels * F;
    const int workers = std::min(num_threads(), in.levels);
    parallel_for(workers, 1, [&](int64_t worker, int64_t last) {
      for (; worker < last; worker++) {
        for (int l = static_cast<int>(worker); l < in.levels; l += workers)
          std::fill(v_table + F * in.starts[l], v_table + F * in.starts[l + 1], 0.f);
        for (int64_t chunk = 0; chunk < in.count; chunk += kChunk) {
          const int64_t end = std::min(in.count, chunk + kChunk);
          for (int l = static_cast<int>(worker); l < in.levels; l += workers)
            for (int64_t first = chunk; first < end; first += W)
              scatter(in, l, first, static_cast<int>(std::min<int64_t>(W, end - first)), v_out + first * row + l * F,
                      row, v_table);
        }
      }
    });
  }

  static PF_INLINE void scatter(const Inputs &in, int l, int64_t first, int filled, const float *v, int row,
                                float *v_table) {
    const Level level = in.level(l);
    vf x[D];
    points(in, first, filled, x);
    const Cells<D> cells(level, x, in.smooth);
    float *table = v_table + F * level.start;
    alignas(64) int32_t rows[Cells<D>::kCorners][W];
    alignas(64) float weights[Cells<D>::kCorners][W];
    for (int corner = 0; corner < Cells<D>::kCorners; corner++) {
      const vi at = cells.row(level, corner);
      std::memcpy(rows[corner], &at, sizeof at);
      store(weights[corner], cells.weight(corner));
    }
    for (int lane = 0; lane < filled; lane++)
      for (int corner = 0; corner < Cells<D>::kCorners; corner++) {
        float *to = table + static_cast<int64_t>(rows[corner][lane]) * F;
        for (int f = 0; f < F; f++) to[f] += weights[corner][lane] * v[lane * row + f];
      }
  }

  static void to_points(const Inputs &in, const float *v_out, float *v_x) {
    const int row = in.levels * F;
    parallel_for((in.count + W - 1) / W, kChunk / W, [&](int64_t block, int64_t end) {
      for (; block < end; block++) {
        const int64_t first = block * W;
        const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
        vf x[D], raw[D], v[D] = {};
        points(in, first, filled, x);
        load_columns<D>(in.x + D * first, filled, raw);
        for (int l = 0; l < in.levels; l++) {
          const Level level = in.level(l);
          const Cells<D> cells(level, x, in.smooth);
          const float *table = in.table + F * level.start;
          vf upstream[F] = {};
          for (int f = 0; f < F; f++)
            for (int lane = 0; lane < filled; lane++) upstream[f][lane] = v_out[(first + lane) * row + l * F + f];
          for (int corner = 0; corner < Cells<D>::kCorners; corner++) {
            const vi at = cells.row(level, corner) * F;
            vf value = vf{};
            for (int f = 0; f < F; f++) value += upstream[f] * gather(table + f, at);
            cells.to_points(corner, value, v);
          }
        }
        for (int d = 0; d < D; d++) v[d] = keep(both(le(vf{}, raw[d]), le(raw[d], broadcast(1.f))), v[d]);
        store_columns<D>(v_x + D * first, filled, v);
      }
    });
  }
};

// Calls visit with the grid's type for `dims` inputs and `features` a level.
template <template <int> class Cells, class Visit>
void with_cells(int dims, int features, Visit visit) {
  const auto with_features = [&]<int D>() {
    if (features == 1) return visit.template operator()<Grid<Cells, D, 1>>();
    if (features == 2) return visit.template operator()<Grid<Cells, D, 2>>();
    if (features == 4) return visit.template operator()<Grid<Cells, D, 4>>();
    if (features == 8) return visit.template operator()<Grid<Cells, D, 8>>();
    throw nb::value_error("features: expected 1, 2, 4 or 8");
  };
  if (dims == 2) return with_features.template operator()<2>();
  if (dims == 3) return with_features.template operator()<3>();
  if (dims == 4) return with_features.template operator()<4>();
  throw nb::value_error("x: expected 2, 3 or 4 axes");
}

template <class Visit>
void with_grid(const std::string &cells, int dims, int features, Visit visit) {
  if (cells == "cubes") return with_cells<Cubes>(dims, features, visit);
  if (cells == "simplices") return with_cells<Simplices>(dims, features, visit);
  throw nb::value_error("cells: expected cubes or simplices");
}

Inputs make_inputs(Floats x, Floats table, Floats scales, Longs starts, Ints sides, bool smooth) {
  return {x.data(),
          table.data(),
          scales.data(),
          starts.data(),
          sides.data(),
          static_cast<int64_t>(x.shape(0)),
          static_cast<int>(scales.size()),
          smooth};
}

void grid_forward(std::string cells, Floats x, Floats table, Floats scales, Longs starts, Ints sides, bool smooth,
                  Floats out) {
  const Inputs in = make_inputs(x, table, scales, starts, sides, smooth);
  const int dims = x.shape(1), features = table.shape(1);
  float *result = out.data();
  nb::gil_scoped_release unlocked;
  with_grid(cells, dims, features, [&]<class G>() { G::forward(in, result); });
}

// Neither gradient is written where it is empty.
void grid_backward(std::string cells, Floats x, Floats table, Floats scales, Longs starts, Ints sides, bool smooth,
                   Floats v_out, Floats v_table, Floats v_x) {
  const Inputs in = make_inputs(x, table, scales, starts, sides, smooth);
  const int dims = x.shape(1), features = table.shape(1);
  float *to_table = v_table.size() > 0 ? v_table.data() : nullptr, *to_x = v_x.size() > 0 ? v_x.data() : nullptr;
  const float *upstream = v_out.data();
  nb::gil_scoped_release unlocked;
  with_grid(cells, dims, features, [&]<class G>() {
    if (to_table) G::to_table(in, upstream, to_table);
    if (to_x) G::to_points(in, upstream, to_x);
  });
}

}  // namespace

void bind_grid(nb::module_ &m) {
  m.def("grid_forward", &grid_forward);
  m.def("grid_backward", &grid_backward);
}

}  // namespace pf
