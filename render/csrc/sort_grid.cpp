// Sorting of rows into a 2D grid (render/sort_grid.py): the blurred grid, and one pass of exchanges.
#include <algorithm>
#include <stdexcept>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

// All orders of four, as render/sort_grid.py lists them: order[k] is which of the four goes to place k.
constexpr int kOrders[24][4] = {{0, 1, 2, 3}, {0, 1, 3, 2}, {0, 2, 1, 3}, {0, 2, 3, 1}, {0, 3, 1, 2}, {0, 3, 2, 1},
                                {1, 0, 2, 3}, {1, 0, 3, 2}, {1, 2, 0, 3}, {1, 2, 3, 0}, {1, 3, 0, 2}, {1, 3, 2, 0},
                                {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 1, 0, 3}, {2, 1, 3, 0}, {2, 3, 0, 1}, {2, 3, 1, 0},
                                {3, 0, 1, 2}, {3, 0, 2, 1}, {3, 1, 0, 2}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 2, 1, 0}};

// Means over the cells within `radius` of each of `count` cells in a line, `step` floats apart, of rows of `depth`.
void blur_line(const float *in, float *out, int64_t count, int64_t step, int depth, int64_t radius, double *sums) {
  std::fill_n(sums, depth, 0.0);
  for (int64_t i = 0; i < std::min(radius, count); i++)
    for (int d = 0; d < depth; d++) sums[d] += in[i * step + d];
  for (int64_t i = 0; i < count; i++) {
    if (i + radius < count)
      for (int d = 0; d < depth; d++) sums[d] += in[(i + radius) * step + d];
    if (i - radius - 1 >= 0)
      for (int d = 0; d < depth; d++) sums[d] -= in[(i - radius - 1) * step + d];
    const double scale =
        1.0 / static_cast<double>(std::min(i + radius, count - 1) - std::max<int64_t>(i - radius, 0) + 1);
    for (int d = 0; d < depth; d++) out[i * step + d] = static_cast<float>(sums[d] * scale);
  }
}

// A box along the columns, then along the rows. `grid`, `between`, `out`: [count, depth], `width` cells a row, the last
// row may be short.
void grid_blur(Floats grid, Floats between, Floats out, int64_t width, int64_t radius) {
  const int64_t count = grid.shape(0), height = (count + width - 1) / width;
  const int depth = static_cast<int>(grid.shape(1));
  const float *in = grid.data();
  float *middle = between.data(), *to = out.data();
  nb::gil_scoped_release unlocked;
  parallel_for(width, 8, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(depth);
    for (int64_t column = begin; column < end; column++) {
      const int64_t cells = height - (column + (height - 1) * width >= count);
      blur_line(in + column * depth, middle + column * depth, cells, width * depth, depth, radius, sums.data());
    }
  });
  parallel_for(height, 8, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(depth);
    for (int64_t row = begin; row < end; row++) {
      const int64_t first = row * width;
      blur_line(middle + first * depth, to + first * depth, std::min(width, count - first), depth, depth, radius,
                sums.data());
    }
  });
}

// Which order of the rows at four cells is nearest to the four targets: the one with the largest sum of products.
int best_order(const float *const *rows, const float *const *targets, int depth) {
  alignas(64) float products[4][4];  // of row i with target k
  for (int i = 0; i < 4; i++) {
    vf partial[4] = {};
    for (int d = 0; d < depth; d += W) {
      const vf row = load(rows[i] + d);
      for (int k = 0; k < 4; k++) partial[k] += row * load(targets[k] + d);
    }
    sum4(partial, products[i]);
  }
  int best = 0;
  float largest = 0.f;
  for (int o = 0; o < 24; o++) {
    const int *order = kOrders[o];
    const float value =
        (products[order[0]][0] + products[order[1]][1]) + (products[order[2]][2] + products[order[3]][3]);
    if (o == 0 || value > largest) best = o, largest = value;
  }
  return best;
}

// One pass. The grid is cut into square blocks, `side` cells wide, the first of which begins at (-offset_y, -offset_x);
// within each, cells are taken in the order `shuffle` (of cells of a block, row by row), those outside the grid left
// out, and four at a time change places as suits `targets` best. `depth` is a multiple of the widest vector.
void grid_exchange(Floats grid, Floats targets, Longs order, Longs shuffle, int64_t width, int64_t side,
                   int64_t offset_x, int64_t offset_y) {
  const int64_t count = grid.shape(0), height = (count + width - 1) / width;
  const int depth = static_cast<int>(grid.shape(1));
  if (depth % W != 0) throw std::invalid_argument("grid: the depth is not a multiple of the vectors' width");
  float *rows = grid.data();
  const float *wanted = targets.data();
  int64_t *indices = order.data();
  const int64_t *places = shuffle.data();
  const int64_t across = (width + offset_x + side - 1) / side, down = (height + offset_y + side - 1) / side;
  nb::gil_scoped_release unlocked;
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(4 * depth);
    for (int64_t block = begin; block < end; block++) {
      const int64_t x0 = block % across * side - offset_x, y0 = block / across * side - offset_y;
      int64_t cells[4];
      int filled = 0;
      for (int64_t i = 0; i < side * side; i++) {
        const int64_t x = x0 + places[i] % side, y = y0 + places[i] / side, cell = y * width + x;
        if (x < 0 || x >= width || y < 0 || cell >= count) continue;
        cells[filled++] = cell;
        if (filled < 4) continue;
        filled = 0;
        const float *from[4], *to[4];
        for (int k = 0; k < 4; k++) from[k] = rows + cells[k] * depth, to[k] = wanted + cells[k] * depth;
        const int best = best_order(from, to, depth);
        if (best == 0) continue;
        int64_t moved[4];
        for (int k = 0; k < 4; k++) {
          std::copy_n(from[kOrders[best][k]], depth, kept.data() + k * depth);
          moved[k] = indices[cells[kOrders[best][k]]];
        }
        for (int k = 0; k < 4; k++) {
          std::copy_n(kept.data() + k * depth, depth, rows + cells[k] * depth);
          indices[cells[k]] = moved[k];
        }
      }
    }
  });
}

}  // namespace

void bind_sort_grid(nb::module_ &m) {
  m.def("grid_blur", &grid_blur);
  m.def("grid_exchange", &grid_exchange);
}

}  // namespace pf
