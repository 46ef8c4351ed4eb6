// Multiresolution grids of trainable features, interpolated: cubes with 2^D corners, or simplices with D + 1.
//
// W points at a time: cells, weights and table rows in vectors, features by gathers, two at a time. The gradient of a
// level's table is summed by one thread in the order of the points, so that it does not depend on how many threads
// there are.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "columns.h"
#include "pages.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int64_t kChunk = 2048;  // points: their gradients stay in the second cache while all levels take them
constexpr uint32_t kPrimes[4] = {1u, 2654435761u, 805459861u, 3674653429u};

typedef uint32_t vu __attribute__((vector_size(4 * W)));
using Half = int16_t;  // the bits of a half-precision number
using Halves = nb::ndarray<Half, nb::c_contig, nb::device::cpu>;

PF_INLINE vf gather(const float *base, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)index, base, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(base, (__m256i)index, 4);
#else
  vf v;
  for (int lane = 0; lane < W; lane++) std::memcpy(&v[lane], base + index[lane], 4);
  return v;
#endif
}
// The two numbers at base + 2 index.
PF_INLINE void gather_pairs(const float *base, vi index, vf &first, vf &second) {
#if defined(__AVX512F__)
  const __m512i i = (__m512i)index;
  const __m512 low = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256(i), base, 8));
  const __m512 high = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti64x4_epi64(i, 1), base, 8));
  const vi even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  first = (vf)_mm512_permutex2var_ps(low, (__m512i)even, high);
  second = (vf)_mm512_permutex2var_ps(low, (__m512i)(even + 1), high);
#else
  first = gather(base, 2 * index), second = gather(base + 1, 2 * index);
#endif
}
// The numbers whose bits are the low halves of the lanes.
PF_INLINE vf from_half(vi bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#else
  const vf magnitude =
      (vf)((bits & 0x7fff) << 13) * 0x1p112f;  // the exponent's offset is 15, not 127; subnormals come out right
  return (vf)((vi)magnitude | (bits & 0x8000) << 16);
#endif
}
PF_INLINE void gather_pairs(const Half *base, vi index, vf &first, vf &second) {
  const vi bits = (vi)gather(reinterpret_cast<const float *>(base), index);
  first = from_half(bits), second = from_half((vi)((vu)bits >> 16));
}
// The F numbers of each row.
template <int F, class Number>
PF_INLINE void gather_rows(const Number *table, vi rows, vf *features) {
  if constexpr (F == 1) features[0] = gather(table, rows);
  else
    for (int f = 0; f < F; f += 2) gather_pairs(table, rows * (F / 2) + f / 2, features[f], features[f + 1]);
}

struct Level {
  float scale;    // cells along the unit interval
  int64_t start;  // first row of the table
  uint32_t rows;  // power of two where hashed
  uint32_t side;  // of the dense lattice; 0 where hashed
};

struct Inputs {
  const float *x;
  int64_t count;
  std::vector<Level> levels;
  bool smooth;

  int num_levels() const { return static_cast<int>(levels.size()); }
};

// The rows, within the level, of the lattice points beside W points: what each axis adds, for the lower and the upper
// one.
template <int D, bool Hashed>
struct Rows {
  vu low[D], high[D];
  uint32_t mask;

  PF_INLINE Rows(const Level &level, const vi *cell) : mask(level.rows - 1u) {
    uint32_t stride = 1;
    for (int d = 0; d < D; d++, stride *= level.side) {
      const uint32_t factor = Hashed ? kPrimes[d] : stride;
      low[d] = (vu)cell[d] * factor, high[d] = low[d] + factor;
    }
  }
  // up(d): the upper point's part if the mask or number is set, else the lower one's.
  template <class Part>
  PF_INLINE vi row(Part part) const {
    vu row = part(0);
    for (int d = 1; d < D; d++) row = Hashed ? row ^ part(d) : row + part(d);
    return (vi)(Hashed ? row & mask : row);
  }
};

// The corners of the cells that W points lie in, their weights, and the weights' derivatives to the points.
template <int D, bool Hashed>
struct Cubes {
  static constexpr int kCorners = 1 << D, kNeighbors = 2;  // corners of which one line of the cache mostly holds all
  vf near[D], far[D], slope[D];  // weights of the lower and the upper corner along each axis
  Rows<D, Hashed> rows;

  PF_INLINE Cubes(const Level &level, const vf *x, bool smooth) : rows(place(level, x, smooth)) {}
  PF_INLINE Rows<D, Hashed> place(const Level &level, const vf *x, bool smooth) {
    vi cell[D];
    for (int d = 0; d < D; d++) {
      const vf position = x[d] * level.scale + 0.5f;
      cell[d] = truncate(position);
      const vf f = position - to_float(cell[d]);
      far[d] = smooth ? f * f * (3.f - 2.f * f) : f;
      slope[d] = (smooth ? 6.f * f * (1.f - f) : broadcast(1.f)) * level.scale;
      near[d] = 1.f - far[d];
    }
    return {level, cell};
  }
  PF_INLINE vi row(int corner) const {
    return rows.row([&](int d) { return corner >> d & 1 ? rows.high[d] : rows.low[d]; });
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
template <int D, bool Hashed>
struct Simplices {
  static constexpr int kCorners = D + 1, kNeighbors = 1;
  vi rank[D];    // place of each axis in that order
  vf sorted[D];  // the fractional parts in that order
  float scale, skew;
  Rows<D, Hashed> rows;

  PF_INLINE Simplices(const Level &level, const vf *x, bool) : scale(level.scale), rows(place(level, x)) {}
  PF_INLINE Rows<D, Hashed> place(const Level &level, const vf *x) {
    skew = (std::sqrt(D + 1.f) - 1.f) / D;
    vi cell[D];
    vf total = x[0], f[D];
    for (int d = 1; d < D; d++) total += x[d];
    for (int d = 0; d < D; d++) {
      const vf position = (x[d] + total * skew) * level.scale + 0.5f;
      cell[d] = truncate(position), f[d] = position - to_float(cell[d]);
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
    return {level, cell};
  }
  static PF_INLINE vm is(vi a, int k) { return but_not(lt(a, vi{} + (k + 1)), lt(a, vi{} + k)); }
  PF_INLINE vi row(int corner) const {
    return rows.row([&](int d) { return (vu)select(lt(rank[d], vi{} + corner), (vi)rows.high[d], (vi)rows.low[d]); });
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

// Calls visit<whether it is hashed>().
template <class Visit>
PF_INLINE void with_level(const Level &level, Visit visit) {
  if (level.side) visit.template operator()<false>();
  else visit.template operator()<true>();
}

template <template <int, bool> class Cells, int D, int F>
struct Grid {
  // Levels whose features fill a vector; and their features.
  static constexpr int kGroup = F < W ? W / F : 1, kColumns = kGroup * F;

  // Coordinates of W points from `first` on, within the unit cube.
  static PF_INLINE void points(const Inputs &in, int64_t first, int filled, vf *x) {
    load_columns<D>(in.x + D * first, filled, x);
    for (int d = 0; d < D; d++) x[d] = min(max(x[d], vf{}), broadcast(1.f));
  }

  template <class Number>
  static void forward(const Inputs &in, const Number *table, float *out) {
    const int row = in.num_levels() * F;
    parallel_for((in.count + W - 1) / W, kChunk / W, [&](int64_t block, int64_t end) {
      for (; block < end; block++) {
        const int64_t first = block * W;
        const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
        vf x[D];
        points(in, first, filled, x);
        for (int group = 0; group < in.num_levels(); group += kGroup) {
          const int levels = std::min(kGroup, in.num_levels() - group);
          vf features[kColumns] = {};
          for (int l = 0; l < levels; l++) {
            const Level &level = in.levels[group + l];
            with_level(level, [&]<bool Hashed>() {
              const Cells<D, Hashed> cells(level, x, in.smooth);
              vf sums[F] = {};
              for (int corner = 0; corner < cells.kCorners; corner++) {
                vf found[F];
                gather_rows<F>(table + F * level.start, cells.row(corner), found);
                const vf weight = cells.weight(corner);
                for (int f = 0; f < F; f++) sums[f] += weight * found[f];
              }
              for (int f = 0; f < F; f++) features[l * F + f] = sums[f];
            });
          }
          store_rows(out + first * row + group * F, row, filled, levels * F, features);
        }
      }
    });
  }

  // `columns` of W rows of `stride` floats, and back.
  static PF_INLINE void store_rows(float *to, int stride, int rows, int columns, vf *values) {
    for (int c = 0; c < kColumns; c += W) {
      transpose(values + c);
      for (int r = 0; r < rows; r++)
        store_some(to + static_cast<int64_t>(r) * stride + c, values[c + r], std::clamp(columns - c, 0, W));
    }
  }
  static PF_INLINE void load_rows(const float *from, int stride, int rows, int columns, vf *values) {
    for (int c = 0; c < kColumns; c += W) {
      for (int r = 0; r < W; r++)
        values[c + r] =
            r < rows ? load_some(from + static_cast<int64_t>(r) * stride + c, std::clamp(columns - c, 0, W)) : vf{};
      transpose(values + c);
    }
  }

  static void to_table(const Inputs &in, const float *v_out, float *v_table) {
    const int levels = in.num_levels(), row = levels * F;
    const int workers = std::min(num_threads(), levels);
    parallel_for(workers, 1, [&](int64_t worker, int64_t last) {
      for (; worker < last; worker++) {
        for (int l = static_cast<int>(worker); l < levels; l += workers)
          std::fill_n(v_table + F * in.levels[l].start, F * static_cast<int64_t>(in.levels[l].rows), 0.f);
        for (int64_t chunk = 0; chunk < in.count; chunk += kChunk) {
          const int64_t end = std::min(in.count, chunk + kChunk);
          for (int l = static_cast<int>(worker); l < levels; l += workers)
            with_level(in.levels[l], [&]<bool Hashed>() {
              scatter<Hashed>(in, in.levels[l], chunk, end, v_out + l * F, row, v_table + F * in.levels[l].start);
            });
        }
      }
    });
  }

  typedef float Features __attribute__((vector_size(4 * F)));
  template <int Corners>
  struct Targets {  // of W points' gradients
    alignas(64) int32_t rows[Corners][W];
    alignas(64) float weights[Corners][W];
  };

  // Adds gradients of the points from `begin` to `end`. What the next W points will add to is fetched meanwhile.
  template <bool Hashed>
  static void scatter(const Inputs &in, const Level &level, int64_t begin, int64_t end, const float *v_out, int row,
                      float *table) {
    using Cell = Cells<D, Hashed>;
    Targets<Cell::kCorners> targets[2];
    const auto aim = [&](int64_t first, Targets<Cell::kCorners> &to) {
      vf x[D];
      points(in, first, static_cast<int>(std::min<int64_t>(W, end - first)), x);
      const Cell cells(level, x, in.smooth);
      for (int corner = 0; corner < Cell::kCorners; corner++) {
        const vi rows = cells.row(corner);
        std::memcpy(to.rows[corner], &rows, sizeof rows);
        store(to.weights[corner], cells.weight(corner));
        if (Hashed && corner % Cell::kNeighbors == 0)
          for (int lane = 0; lane < W; lane++)
            __builtin_prefetch(table + static_cast<int64_t>(to.rows[corner][lane]) * F, 1);
      }
    };
    aim(begin, targets[0]);
    for (int64_t first = begin, turn = 0; first < end; first += W, turn ^= 1) {
      if (first + W < end) aim(first + W, targets[turn ^ 1]);
      const auto &now = targets[turn];
      const int filled = static_cast<int>(std::min<int64_t>(W, end - first));
      for (int lane = 0; lane < filled; lane++) {
        Features v;
        std::memcpy(&v, v_out + (first + lane) * row, sizeof v);
        for (int corner = 0; corner < Cell::kCorners; corner++) {
          float *to = table + static_cast<int64_t>(now.rows[corner][lane]) * F;
          Features sum;
          std::memcpy(&sum, to, sizeof sum);
          sum += now.weights[corner][lane] * v;
          std::memcpy(to, &sum, sizeof sum);
        }
      }
    }
  }

  template <class Number>
  static void to_points(const Inputs &in, const Number *table, const float *v_out, float *v_x) {
    const int row = in.num_levels() * F;
    parallel_for((in.count + W - 1) / W, kChunk / W, [&](int64_t block, int64_t end) {
      for (; block < end; block++) {
        const int64_t first = block * W;
        const int filled = static_cast<int>(std::min<int64_t>(W, in.count - first));
        vf x[D], raw[D], v[D] = {};
        points(in, first, filled, x);
        load_columns<D>(in.x + D * first, filled, raw);
        for (int group = 0; group < in.num_levels(); group += kGroup) {
          const int levels = std::min(kGroup, in.num_levels() - group);
          vf upstream[kColumns];
          load_rows(v_out + first * row + group * F, row, filled, levels * F, upstream);
          for (int l = 0; l < levels; l++) {
            const Level &level = in.levels[group + l];
            with_level(level, [&]<bool Hashed>() {
              const Cells<D, Hashed> cells(level, x, in.smooth);
              for (int corner = 0; corner < cells.kCorners; corner++) {
                vf found[F], value = vf{};
                gather_rows<F>(table + F * level.start, cells.row(corner), found);
                for (int f = 0; f < F; f++) value += upstream[l * F + f] * found[f];
                cells.to_points(corner, value, v);
              }
            });
          }
        }
        for (int d = 0; d < D; d++) v[d] = keep(both(le(vf{}, raw[d]), le(raw[d], broadcast(1.f))), v[d]);
        store_columns<D>(v_x + D * first, filled, v);
      }
    });
  }
};

// Calls visit with the grid's type for `dims` inputs and `features` a level.
template <template <int, bool> class Cells, class Visit>
void with_cells(int dims, int features, Visit visit) {
  const auto with_features = [&]<int D>() {
    if (features == 1) return visit.template operator()<Grid<Cells, D, 1>, 1>();
    if (features == 2) return visit.template operator()<Grid<Cells, D, 2>, 2>();
    if (features == 4) return visit.template operator()<Grid<Cells, D, 4>, 4>();
    if (features == 8) return visit.template operator()<Grid<Cells, D, 8>, 8>();
    throw nb::value_error("table: expected 1, 2, 4 or 8 features");
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

// Nothing is read or written outside the table: each level's rows lie in it and hold each point of the level's lattice.
void check_level(const Level &level, const std::string &cells, int dims, int64_t rows, int features) {
  const double stretch = cells == "simplices" ? std::sqrt(dims + 1.) : 1.;
  const bool fits = level.scale > 0 && level.scale < 1e6 && level.start >= 0 && level.rows > 0 &&
                    level.start + level.rows <= rows && level.rows < (1u << 31) / static_cast<uint32_t>(features);
  const bool holds =
      level.side ? level.side > stretch * level.scale * (1 + 1e-6) + 1.5 && std::pow(level.side, dims) <= level.rows
                 : (level.rows & (level.rows - 1)) == 0;
  if (!fits || !holds)
    throw nb::value_error("scales, starts, sides: expected rows of the table for all points of each level");
}

Inputs make_inputs(const std::string &cells, Floats x, int64_t rows, int features, Floats scales, Longs starts,
                   Ints sides, bool smooth) {
  Inputs in{x.data(), static_cast<int64_t>(x.shape(0)), {}, smooth};
  for (size_t l = 0; l < scales.size(); l++) {
    const int64_t start = starts.data()[l], end = starts.data()[l + 1];
    const bool is_range = 0 <= start && start < end && end <= rows && end - start < INT32_MAX;
    in.levels.push_back({scales.data()[l], start, is_range ? static_cast<uint32_t>(end - start) : 0u,
                         static_cast<uint32_t>(sides.data()[l])});
    check_level(in.levels.back(), cells, static_cast<int>(x.shape(1)), rows, features);
  }
  return in;
}

// The table is of floats or of half-precision numbers, then with more than one a row.
template <class Table>
void grid_forward(std::string cells, Floats x, Table table, Floats scales, Longs starts, Ints sides, bool smooth,
                  Floats out) {
  const int dims = x.shape(1), features = table.shape(1);
  const Inputs in = make_inputs(cells, x, table.shape(0), features, scales, starts, sides, smooth);
  const auto *numbers = table.data();
  float *result = out.data();
  nb::gil_scoped_release unlocked;
  want_large_pages(numbers, table.nbytes());
  with_grid(cells, dims, features, [&]<class G, int F>() {
    if constexpr (F > 1 || std::is_same_v<Table, Floats>) G::forward(in, numbers, result);
  });
}

// Neither gradient is written where it is empty.
template <class Table>
void grid_backward(std::string cells, Floats x, Table table, Floats scales, Longs starts, Ints sides, bool smooth,
                   Floats v_out, Floats v_table, Floats v_x) {
  const int dims = x.shape(1), features = table.shape(1);
  const Inputs in = make_inputs(cells, x, table.shape(0), features, scales, starts, sides, smooth);
  float *to_table = v_table.size() > 0 ? v_table.data() : nullptr, *to_x = v_x.size() > 0 ? v_x.data() : nullptr;
  const float *upstream = v_out.data();
  const auto *numbers = table.data();
  nb::gil_scoped_release unlocked;
  if (to_table) want_large_pages(to_table, v_table.nbytes());
  with_grid(cells, dims, features, [&]<class G, int F>() {
    if (to_table) G::to_table(in, upstream, to_table);
    if constexpr (F > 1 || std::is_same_v<Table, Floats>)
      if (to_x) G::to_points(in, numbers, upstream, to_x);
  });
}

}  // namespace

void bind_grid(nb::module_ &m) {
  m.def("grid_forward", &grid_forward<Floats>);
  m.def("grid_forward", &grid_forward<Halves>);
  m.def("grid_backward", &grid_backward<Floats>);
  m.def("grid_backward", &grid_backward<Halves>);
}

}  // namespace pf
