// Lists of the primitives that reach each tile, in order of depth: count, scatter, then sort each tile's short list.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "primitives.h"
#include "tiles.h"

namespace pf {
namespace {

constexpr int kRadixFrom = 96;  // shorter lists are sorted by comparison

// What `bin_count` leaves for `bin_sort`: each worker's share of the primitives, the tiles they reach, and for each
// worker and tile where its first intersection goes.
struct Plan {
  std::vector<std::vector<int32_t>> tiles;
  Buffer<int32_t> slots;
  int workers = 0;
};
thread_local Plan plan;

struct Grid {
  int width, height, columns, rows;
  Grid(int w, int h)
      : width(w), height(h), columns((w + kTileSize - 1) / kTileSize), rows((h + kTileSize - 1) / kTileSize) {}
  int tiles() const { return columns * rows; }
};

// First and last pixel of 0 .. length - 1 whose centres lie within `radius` of `center`, give or take rounding.
struct Interval {
  int first, last;
  Interval(float center, float radius, int length)
      : first(static_cast<int>(std::ceil(std::max(center - radius - 0.51f, 0.f)))),
        last(static_cast<int>(std::floor(std::min(center + radius - 0.49f, length - 1.f)))) {}
  bool empty() const { return first > last; }
};

// Calls visit(tile) for each tile with a pixel centre inside the outline, row by row.
template <class Primitive, class Visit>
PF_INLINE void visit_tiles(const Grid &grid, const float *params, const float *radii, Visit visit) {
  const Interval x(params[0], radii[0], grid.width), y(params[1], radii[1], grid.height);
  if (x.empty() || y.empty()) return;
  const int first_row = y.first / kTileSize, last_row = y.last / kTileSize;
  const int first_column = x.first / kTileSize, last_column = x.last / kTileSize;
  if (first_column == last_column) {  // nothing for the outline to cut off
    for (int row = first_row; row <= last_row; row++) visit(row * grid.columns + first_column);
    return;
  }
  const auto outline = Primitive(params).outline();
  for (int row = first_row; row <= last_row; row++) {
    const Span<float> span =
        outline.row_span(row * kTileSize + 0.5f, std::min((row + 1) * kTileSize, grid.height) - 0.5f);
    if (!(span.left <= span.right)) continue;
    const int from =
        static_cast<int>(std::clamp(span.left + 0.499f, static_cast<float>(x.first), x.last + 1.f)) / kTileSize;
    const int to =
        static_cast<int>(std::clamp(span.right - 0.499f, x.first - 1.f, static_cast<float>(x.last))) / kTileSize;
    for (int column = from; column <= to; column++) visit(row * grid.columns + column);
  }
}

int64_t bin_count(std::string name, Floats params, Floats depths, Floats radii, int width, int height, int tile_size,
                  Ints tile_ranges, Ints row_starts) {
  if (tile_size != kTileSize)
    throw nb::value_error("tile_size: the compiled kernels have their own, see kernels.tile_size");
  const Grid grid(width, height);
  const int64_t count = depths.shape(1), all = depths.shape(0) * count, tiles = depths.shape(0) * grid.tiles();
  const float *in_params = params.data(), *in_radii = radii.data();
  int32_t *ranges = tile_ranges.data(), *starts = row_starts.data();
  nb::gil_scoped_release unlocked;
  const int workers = num_threads();
  plan.workers = workers;
  plan.tiles.resize(workers);
  int32_t *slots = plan.slots.need(static_cast<size_t>(workers) * tiles);
  auto &lists = plan.tiles;
  with_primitive(name, [&]<class Primitive>() {
    parallel([&](int worker, int) {
      const auto [begin, end] = share(all, worker, workers);
      auto &list = lists[worker];
      int32_t *counts = slots + static_cast<size_t>(worker) * tiles;
      std::fill(counts, counts + tiles, 0);
      list.clear();
      for (int64_t id = begin; id < end; id++) {
        const size_t before = list.size();
        const int32_t offset = static_cast<int32_t>(id / count) * grid.tiles();
        if (in_radii[2 * id] > 0.f)
          visit_tiles<Primitive>(grid, in_params + id * Primitive::kParams, in_radii + 2 * id, [&](int tile) {
            list.push_back(offset + tile);
            counts[offset + tile]++;
          });
        starts[id + 1] = static_cast<int32_t>(list.size() - before);
      }
    });
  });
  int64_t total = 0;
  for (int64_t tile = 0; tile < tiles; tile++) {
    ranges[tile] = static_cast<int32_t>(total);
    for (int worker = 0; worker < workers; worker++) {
      int32_t &slot = slots[static_cast<size_t>(worker) * tiles + tile];
      const int32_t here = slot;
      slot = static_cast<int32_t>(total);
      total += here;
    }
    if (total > INT32_MAX)
      throw nb::value_error("bin: 2^31 tile intersections or more; use fewer primitives or a smaller image");
  }
  ranges[tiles] = static_cast<int32_t>(total);
  starts[0] = 0;
  for (int64_t id = 0; id < all; id++) starts[id + 1] += starts[id];
  return total;
}

struct Scratch {
  std::vector<uint64_t> keys, other;
};

// One intersection on its way to its tile.
struct Entry {
  uint32_t depth;
  int32_t id, row;
};

// Sorts keys (depth bits above, position below) by their upper half, stably: bytes from the low end, skipping constant
// ones.
uint64_t *sort_keys(Scratch &scratch, int length) {
  uint64_t *from = scratch.keys.data(), *to = scratch.other.data();
  if (length < kRadixFrom) {
    std::sort(from, from + length);
    return from;
  }
  uint32_t counts[4][256] = {};
  for (int i = 0; i < length; i++)
    for (int byte = 0; byte < 4; byte++) counts[byte][(from[i] >> (32 + 8 * byte)) & 255]++;
  for (int byte = 0; byte < 4; byte++) {
    uint32_t next = 0;
    bool constant = false;
    for (uint32_t &c : counts[byte]) {
      constant |= c == static_cast<uint32_t>(length);
      const uint32_t here = c;
      c = next;
      next += here;
    }
    if (constant) continue;
    for (int i = 0; i < length; i++) to[counts[byte][(from[i] >> (32 + 8 * byte)) & 255]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

// Right after `bin_count` of the same inputs and on the same thread: the plan is not kept for long.
void bin_sort(std::string, Floats, Floats depths, Floats, int, int, int, Ints tile_ranges, Ints row_starts,
              Ints out_ids, Ints out_rows) {
  static thread_local Buffer<Entry> buffer;
  const float *in_depths = depths.data();
  const int32_t *ranges = tile_ranges.data(), *starts = row_starts.data();
  const int64_t all = depths.size(), tiles = static_cast<int64_t>(tile_ranges.size()) - 1;
  int32_t *ids = out_ids.data(), *rows = out_rows.data();
  nb::gil_scoped_release unlocked;
  const int workers = plan.workers;
  int32_t *slots = plan.slots.data();
  auto &lists = plan.tiles;
  Entry *entries = buffer.need(ranges[tiles]);
  parallel_for(workers, 1, [&](int64_t worker, int64_t last) {
    for (; worker < last; worker++) {
      const auto [begin, end] = share(all, static_cast<int>(worker), workers);
      const int32_t *tile = lists[worker].data();
      int32_t *slot = slots + worker * tiles;
      for (int64_t id = begin; id < end; id++) {
        const uint32_t key = std::bit_cast<uint32_t>(in_depths[id]);  // positive floats order like their bits
        for (int32_t row = starts[id]; row < starts[id + 1]; row++)
          entries[slot[*tile++]++] = {key, static_cast<int32_t>(id), row};
      }
    }
  });
  parallel_for(tiles, 4, [&](int64_t tile, int64_t last) {
    static thread_local Scratch scratch;
    for (; tile < last; tile++) {
      const int32_t begin = ranges[tile], length = ranges[tile + 1] - begin;
      if (scratch.keys.size() < static_cast<size_t>(length)) scratch.keys.resize(length), scratch.other.resize(length);
      for (int i = 0; i < length; i++)
        scratch.keys[i] = static_cast<uint64_t>(entries[begin + i].depth) << 32 | static_cast<uint32_t>(i);
      const uint64_t *sorted = sort_keys(scratch, length);
      for (int i = 0; i < length; i++) {
        const Entry &entry = entries[begin + static_cast<uint32_t>(sorted[i])];
        ids[begin + i] = entry.id, rows[begin + i] = entry.row;
      }
    }
  });
}

}  // namespace

void bind_bin(nb::module_ &m) {
  m.def("bin_count", &bin_count);
  m.def("bin_sort", &bin_sort);
}

}  // namespace pf
