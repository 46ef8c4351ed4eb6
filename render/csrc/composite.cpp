// Front-to-back blending of sorted primitives over 32x32-pixel tiles (16x16 where vectors are short), and its gradient.
//
// A tile's pixels live in blocks of W, one vector each; a bit mask says which blocks a primitive reaches and which
// still let light through. The backward pass walks the list back to front and writes one record of sums per (primitive,
// tile), so that no two threads ever add to the same place; the records of one primitive are contiguous and are added
// up last.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "primitives.h"
#include "tiles.h"

namespace pf {
namespace {

constexpr int kBatch = 64;  // primitives fetched together
constexpr int kPrefetch = 8;  // records ahead
constexpr int kAnyChannels = 0;  // template argument: the number of channels is known at run time only
constexpr int kMaxChannels = 64;

struct Scene {
  const float *params, *features, *depths, *background;
  const int32_t *ids, *tile_ranges;
  int cameras, count, dims, width, height, columns, rows;
  bool depth;

  int channels() const { return dims + depth; }
  int tiles() const { return cameras * rows * columns; }
};

// A run of a tile's list, brought together: the loads of one batch overlap, where one at a time each would wait for
// memory.
template <class Primitive, int Channels>
struct Batch {
  static constexpr int kRoom = Channels ? Channels : kMaxChannels;
  float params[kBatch][Primitive::kParams], channels[kBatch][kRoom];
  uint64_t covered[kBatch];

  // With the blocks of the tile at (x, y) that each reaches: here nothing waits for a mispredicted branch.
  PF_INLINE void fetch(const Scene &s, const int32_t *ids, int count, float x, float y) {
    fetch(s, ids, count);
    for (int i = 0; i < count; i++) covered[i] = covered_blocks(Primitive(params[i]).outline(), x, y);
  }

  PF_INLINE void fetch(const Scene &s, const int32_t *ids, int count) {
    for (int i = 0; i < count; i++)
      std::memcpy(params[i], s.params + static_cast<size_t>(ids[i]) * Primitive::kParams, sizeof params[i]);
    const int dims = Channels ? Channels - s.depth : s.dims;
    for (int i = 0; i < count; i++)
      for (int d = 0; d < dims; d++) channels[i][d] = s.features[static_cast<size_t>(ids[i]) * dims + d];
    if (s.depth)
      for (int i = 0; i < count; i++) channels[i][dims] = s.depths[ids[i]];
  }
};

struct Tile {
  int index, camera, x, y;  // x, y: pixel of the corner
  Tile(const Scene &s, int tile)
      : index(tile),
        camera(tile / (s.rows * s.columns)),
        x(tile % s.columns * kTileSize),
        y(tile / s.columns % s.rows * kTileSize) {}
  // Flat pixel index in [C, H, W], or -1 outside the image.
  int64_t pixel(const Scene &s, int block, int lane) const {
    const int px = x + column_in_tile(block, lane), py = y + row_in_tile(block, lane);
    return px < s.width && py < s.height ? (static_cast<int64_t>(camera) * s.height + py) * s.width + px : -1;
  }
};

struct ForwardOut {
  float *features, *alpha, *depth, *median, *trans;
  int32_t *stops;
  int64_t *masks;
};

template <class Primitive, int Channels, bool Median>
void forward_tile(const Scene &s, const ForwardOut &out, int tile_index) {
  const int channels = Channels ? Channels : s.channels();
  constexpr int kRoom = Channels ? Channels : kMaxChannels;
  struct Block {
    vf trans, median;
    vi stop;
    vm live;
  };
  const Tile tile(s, tile_index);
  const int begin = s.tile_ranges[tile_index], length = s.tile_ranges[tile_index + 1] - begin;
  Block blocks[kBlocks];
  alignas(64) vf sums[kBlocks][kRoom];
  uint64_t alive = 0;
  for (int b = 0; b < kBlocks; b++) {
    const vf inside_x = kGrid.x[b] + static_cast<float>(tile.x), inside_y = kGrid.y[b] + static_cast<float>(tile.y);
    const vm live = both(lt(inside_x, broadcast(s.width)), lt(inside_y, broadcast(s.height)));
    blocks[b] = {broadcast(1.f), vf{}, vi{} + length, live};
    for (int d = 0; d < channels; d++) sums[b][d] = vf{};
    if (any(live)) alive |= uint64_t{1} << b;
  }
  const int32_t *list = s.ids + begin;
  Batch<Primitive, Channels> batch;
  int i = 0;
  for (; i < length && alive; i++) {
    if (i % kBatch == 0) batch.fetch(s, list + i, std::min(kBatch, length - i), tile.x, tile.y);
    const Primitive primitive(batch.params[i % kBatch]);
    const float *channel = batch.channels[i % kBatch];
    const uint64_t reached = batch.covered[i % kBatch] & alive;
    uint64_t touched = reached;  // without the blocks that it misses after all: the backward pass need not look
    const float offset_x = tile.x - primitive.x, offset_y = tile.y - primitive.y;
    for (uint64_t rest = reached; rest; rest &= rest - 1) {
      const int b = std::countr_zero(rest);
      Block &block = blocks[b];
      vf raw;
      typename Primitive::Pixels pixels;
      const vm hit = both(primitive.alpha(kGrid.x[b] + offset_x, kGrid.y[b] + offset_y, raw, pixels), block.live);
      touched &= ~(static_cast<uint64_t>(!any(hit)) << b);
      const vf alpha = keep(hit, min(raw, broadcast(kAlphaMax)));
      const vf after = block.trans - alpha * block.trans;
      const vm finished = le(after, broadcast(kTransMin));
      const vf trans = select(finished, block.trans, after), weight = block.trans - trans;
      if constexpr (Median) {
        const vm crossed = both(lt(broadcast(0.5f), block.trans), le(trans, broadcast(0.5f)));
        block.median = select(crossed, broadcast(s.depths[list[i]]), block.median);
      }
      block.trans = trans;
      for (int d = 0; d < channels; d++) sums[b][d] += weight * channel[d];
      if (__builtin_expect(any(finished),
                           0)) {  // only live lanes can be: the others keep a transmittance above kTransMin
        block.stop = select(finished, vi{} + i, block.stop);
        block.live = but_not(block.live, finished);
        if (!any(block.live)) alive &= ~(uint64_t{1} << b);
      }
    }
    out.masks[begin + i] = static_cast<int64_t>(touched);
  }
  std::fill(out.masks + begin + i, out.masks + begin + length, 0);
  for (int b = 0; b < kBlocks; b++) {
    store(out.trans + (static_cast<size_t>(tile_index) * kBlocks + b) * W, blocks[b].trans);
    std::memcpy(out.stops + (static_cast<size_t>(tile_index) * kBlocks + b) * W, &blocks[b].stop, sizeof(vi));
    for (int lane = 0; lane < W; lane++) {
      const int64_t pixel = tile.pixel(s, b, lane);
      if (pixel < 0) continue;
      const float trans = blocks[b].trans[lane], *back = s.background + tile.camera * s.dims;
      for (int d = 0; d < s.dims; d++) out.features[pixel * s.dims + d] = sums[b][d][lane] + trans * back[d];
      out.alpha[pixel] = 1.f - trans;
      if (s.depth) out.depth[pixel] = sums[b][s.dims][lane];
      if constexpr (Median) out.median[pixel] = blocks[b].median[lane];
    }
  }
}

struct BackwardIn {
  const float *v_features, *v_alpha, *v_depth, *trans;
  const int32_t *stops, *rows;
  const int64_t *masks;
};

constexpr int padded(int sums) { return (sums + 3) / 4 * 4; }

template <class Primitive, int Channels, bool Absolute>
void backward_tile(const Scene &s, const BackwardIn &in, float *records, float *v_background, int tile_index) {
  const int channels = Channels ? Channels : s.channels();
  constexpr int kRoom = Channels ? Channels : kMaxChannels, kShape = Primitive::kSums + 2 * Absolute;
  const int record_size = padded(kShape + channels);
  const Tile tile(s, tile_index);
  const int begin = s.tile_ranges[tile_index], length = s.tile_ranges[tile_index + 1] - begin;
  alignas(64) vf trans[kBlocks], behind[kBlocks], v_out[kBlocks][kRoom];
  vi stop[kBlocks];
  const float *back = s.background + tile.camera * s.dims;
  for (int b = 0; b < kBlocks; b++) {
    trans[b] = load(in.trans + (static_cast<size_t>(tile_index) * kBlocks + b) * W);
    std::memcpy(&stop[b], in.stops + (static_cast<size_t>(tile_index) * kBlocks + b) * W, sizeof(vi));
    vf v_trans = vf{};
    for (int lane = 0; lane < W; lane++) {
      const int64_t pixel = tile.pixel(s, b, lane);
      if (pixel < 0) stop[b][lane] = 0;
      for (int d = 0; d < s.dims; d++) v_out[b][d][lane] = pixel < 0 ? 0.f : in.v_features[pixel * s.dims + d];
      if (s.depth) v_out[b][s.dims][lane] = pixel < 0 ? 0.f : in.v_depth[pixel];
      v_trans[lane] = pixel < 0 ? 0.f : -in.v_alpha[pixel];
    }
    for (int d = 0; d < s.dims; d++) {
      v_background[tile_index * s.dims + d] += sum(trans[b] * v_out[b][d]);
      v_trans += v_out[b][d] * back[d];
    }
    behind[b] = trans[b] * v_trans;  // what the light that passes is worth: sum of weight * value behind here
  }
  const int32_t *list = s.ids + begin, *rows = in.rows + begin;
  const int64_t *masks = in.masks + begin;
  Batch<Primitive, Channels> batch;
  for (int i = length - 1; i >= 0; i--) {
    if (i == length - 1 || i % kBatch == kBatch - 1) batch.fetch(s, list + i / kBatch * kBatch, i % kBatch + 1);
    float *record = records + static_cast<size_t>(rows[i]) * record_size;
    if (!masks[i]) {
      std::fill(record, record + record_size, 0.f);
      continue;
    }
    if (i >= kPrefetch) __builtin_prefetch(records + static_cast<size_t>(rows[i - kPrefetch]) * record_size, 1);
    const Primitive primitive(batch.params[i % kBatch]);
    const float *channel = batch.channels[i % kBatch];
    const float offset_x = tile.x - primitive.x, offset_y = tile.y - primitive.y;
    vf sums[kShape + kRoom] = {};
    for (uint64_t rest = static_cast<uint64_t>(masks[i]); rest; rest &= rest - 1) {
      const int b = std::countr_zero(rest);
      const vf dx = kGrid.x[b] + offset_x, dy = kGrid.y[b] + offset_y;
      vf raw;
      typename Primitive::Pixels pixels;
      const vm hit = both(primitive.alpha(dx, dy, raw, pixels), lt(vi{} + i, stop[b]));
      raw = keep(hit, raw);
      const vf alpha = min(raw, broadcast(kAlphaMax)), inverse = reciprocal(1.f - alpha);
      const vf before = trans[b] * inverse, weight = alpha * before;
      vf value = v_out[b][0] * channel[0];
      for (int d = 1; d < channels; d++) value += v_out[b][d] * channel[d];
      const vf v_alpha = keep(le(raw, broadcast(kAlphaMax)), before * value - inverse * behind[b]);
      trans[b] = before;
      behind[b] += weight * value;
      primitive.accumulate(dx, dy, alpha, v_alpha, pixels, sums);
      if constexpr (Absolute) primitive.accumulate_absolute(dx, dy, alpha, v_alpha, pixels, sums + Primitive::kSums);
      for (int d = 0; d < channels; d++) sums[kShape + d] += weight * v_out[b][d];
    }
    if constexpr (Channels != kAnyChannels) {
      pf::sums<kShape + Channels>(sums, record);
    } else {
      for (int k = 0; k < kShape + channels; k++) record[k] = sum(sums[k]);
    }
  }
}

struct BackwardOut {
  float *params, *features, *depths, *background, *absgrad;
};

// Adds up each primitive's records and turns the sums into gradients.
template <class Primitive, bool Absolute>
void reduce_records(const Scene &s, const int32_t *row_starts, const float *records, const BackwardOut &out) {
  constexpr int kShape = Primitive::kSums + 2 * Absolute;
  const int channels = s.channels(), length = kShape + channels, record_size = padded(length);
  parallel_for(static_cast<int64_t>(s.cameras) * s.count, 4096, [&](int64_t first, int64_t last) {
    float total[kShape + kMaxChannels + 4];
    for (int64_t id = first; id < last; id++) {
      std::fill(total, total + record_size, 0.f);
      const float *record = records + static_cast<size_t>(row_starts[id]) * record_size;
      for (int row = row_starts[id]; row < row_starts[id + 1]; row++, record += record_size)
        for (int k = 0; k < record_size; k += 4)
          for (int lane = 0; lane < 4; lane++) total[k + lane] += record[k + lane];
      if (row_starts[id] == row_starts[id + 1])
        std::fill(out.params + id * Primitive::kParams, out.params + (id + 1) * Primitive::kParams, 0.f);
      else Primitive(s.params + id * Primitive::kParams).finish(total, out.params + id * Primitive::kParams);
      for (int d = 0; d < s.dims; d++) out.features[id * s.dims + d] = total[kShape + d];
      out.depths[id] = s.depth ? total[kShape + s.dims] : 0.f;
      if constexpr (Absolute) std::copy_n(total + Primitive::kSums, 2, out.absgrad + 2 * id);
    }
  });
}

// Calls visit with the number of channels as a compile-time constant where that pays.
template <class Visit>
void with_channels(int channels, Visit visit) {
  switch (channels) {
    case 1:
      return visit.template operator()<1>();
    case 3:
      return visit.template operator()<3>();
    case 4:
      return visit.template operator()<4>();
    default:
      return visit.template operator()<kAnyChannels>();
  }
}

Scene make_scene(Floats params, Floats features, Floats depths, Floats background, Ints ids, Ints tile_ranges,
                 int width, int height, bool depth) {
  Scene s{params.data(), features.data(), depths.data(), background.data(), ids.data(), tile_ranges.data()};
  s.cameras = params.shape(0), s.count = params.shape(1), s.dims = features.shape(2), s.width = width,
  s.height = height;
  s.columns = (width + kTileSize - 1) / kTileSize, s.rows = (height + kTileSize - 1) / kTileSize, s.depth = depth;
  if (s.channels() > kMaxChannels) throw nb::value_error("features: the compiled rasterizer takes at most 63 channels");
  return s;
}

void composite_forward(std::string name, Floats params, Floats features, Floats depths, Floats background, Ints ids,
                       Ints tile_ranges, int width, int height, Floats out_features, Floats alpha, Floats depth,
                       Floats median, Floats trans, Ints stops, Longs masks) {
  const Scene s = make_scene(params, features, depths, background, ids, tile_ranges, width, height, depth.size() > 0);
  const ForwardOut out{out_features.data(), alpha.data(), depth.data(), median.data(),
                       trans.data(),        stops.data(), masks.data()};
  const bool with_median = median.size() > 0;
  nb::gil_scoped_release unlocked;
  with_primitive(name, [&]<class Primitive>() {
    with_channels(s.channels(), [&]<int Channels>() {
      parallel_for(s.tiles(), 1, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; tile++) {
          if (with_median) forward_tile<Primitive, Channels, true>(s, out, tile);
          else forward_tile<Primitive, Channels, false>(s, out, tile);
        }
      });
    });
  });
}

void composite_backward(std::string name, Floats params, Floats features, Floats depths, Floats background, Ints ids,
                        Ints rows, Ints tile_ranges, Ints row_starts, int width, int height, Floats trans, Ints stops,
                        Longs masks, Floats v_features, Floats v_alpha, Floats v_depth, Floats out_params,
                        Floats out_features, Floats out_depths, Floats out_background, Floats out_absgrad) {
  static thread_local Buffer<float> records;
  const Scene s = make_scene(params, features, depths, background, ids, tile_ranges, width, height, v_depth.size() > 0);
  const BackwardIn in{v_features.data(), v_alpha.data(), v_depth.data(), trans.data(),
                      stops.data(),      rows.data(),    masks.data()};
  const BackwardOut out{out_params.data(), out_features.data(), out_depths.data(), out_background.data(),
                        out_absgrad.data()};
  const bool absolute = out_absgrad.size() > 0;
  const int32_t *starts = row_starts.data();
  const size_t isects = ids.size();
  nb::gil_scoped_release unlocked;
  std::vector<float> tile_background(static_cast<size_t>(s.tiles()) * s.dims, 0.f);
  with_primitive(name, [&]<class Primitive>() {
    const int record_size = padded(Primitive::kSums + 2 * absolute + s.channels());
    float *memory = records.need(isects * record_size);
    with_channels(s.channels(), [&]<int Channels>() {
      parallel_for(s.tiles(), 1, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; tile++) {
          if (absolute) backward_tile<Primitive, Channels, true>(s, in, memory, tile_background.data(), tile);
          else backward_tile<Primitive, Channels, false>(s, in, memory, tile_background.data(), tile);
        }
      });
    });
    if (absolute) reduce_records<Primitive, true>(s, starts, memory, out);
    else reduce_records<Primitive, false>(s, starts, memory, out);
  });
  std::fill(out.background, out.background + s.cameras * s.dims, 0.f);
  for (int tile = 0; tile < s.tiles(); tile++)
    for (int d = 0; d < s.dims; d++)
      out.background[tile / (s.rows * s.columns) * s.dims + d] += tile_background[tile * s.dims + d];
}

}  // namespace

void bind_composite(nb::module_ &m) {
  m.attr("tile_size") = kTileSize;
  m.def("composite_forward", &composite_forward);
  m.def("composite_backward", &composite_backward);
}

}  // namespace pf
