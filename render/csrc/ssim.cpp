// The photometric loss (1 - w) L1 + w (1 - SSIM) and its gradient image, in one call.
//
// With s = a + b - 1 and d = a - b, blurred to S and D, and the variances P of s and Q of d under the window, SSIM is
// (1 - D^2 / B1) (1 - Q / B2) where B1 = ((S + 1)^2 + D^2) / 2 + C1 and B2 = (P + Q) / 2 + C2. So four blurs suffice
// instead of five, and nothing cancels where the images are alike.
//
// Images are cut into blocks whose working set fits the second-level cache. Blurs are separable: down the columns
// first, four rows of results at a time, then along the rows. Channels are interleaved: a pixel k away is k * channels
// floats away.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;

constexpr int kRadius = 5, kTaps = 2 * kRadius + 1;
constexpr float kWindow[kTaps] = {  // Gaussian, sigma 1.5 pixels, sum 1
                                  0.001028380084f, 0.007598758135f, 0.03600077213f, 0.1093606895f,
                                  0.2130055377f,   0.2660117249f,   0.2130055377f,  0.1093606895f,
                                  0.03600077213f,  0.007598758135f, 0.001028380084f};
constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;
constexpr int kGroup = 4;                            // rows of results that are blurred together
constexpr int kBlockRows = 16, kBlockFloats = 512;   // a multiple of kGroup, of W

constexpr int whole_vectors(int count) { return (count + W - 1) / W * W; }

// One image of a batch, with everything that is not there or does not count read as zero.
struct Image {
  const float *a, *b_floats;
  const uint8_t *b_bytes;  // one of the two b's is null
  const bool *mask;        // null: every pixel counts
  int height, width, channels;

  int length() const { return width * channels; }

  // `count` floats (whole vectors) of row y from `first` on, and 1 where they count.
  void read(int y, int first, int count, float *a_row, float *b_row, float *counts) const {
    const int skip = std::clamp(-first, 0, count),
              last = y < 0 || y >= height ? skip : std::clamp(length() - first, skip, count);
    std::fill(a_row, a_row + skip, 0.f), std::fill(b_row, b_row + skip, 0.f), std::fill(counts, counts + skip, 0.f);
    std::fill(a_row + last, a_row + count, 0.f), std::fill(b_row + last, b_row + count, 0.f);
    std::fill(counts + last, counts + count, 0.f);
    if (last == skip) return;
    const size_t at = static_cast<size_t>(y) * length() + first;
    std::copy(a + at + skip, a + at + last, a_row + skip);
    if (b_floats) std::copy(b_floats + at + skip, b_floats + at + last, b_row + skip);
    else
      for (int i = skip; i < last; i++) b_row[i] = b_bytes[at + i] * (1.f / 255.f);
    std::fill(counts + skip, counts + last, 1.f);
    if (!mask) return;
    const bool *pixel = mask + static_cast<size_t>(y) * width + (first + skip) / channels;
    if (!std::memchr(pixel, 0, (first + last - 1) / channels - (first + skip) / channels + 1)) return;
    for (int i = skip, channel = (first + skip) % channels; i < last; pixel++, channel = 0)
      for (const float one = *pixel; channel < channels && i < last; channel++, i++) counts[i] = one;
    for (int i = 0; i < count; i += W) {
      const vm counted = lt(vf{}, load(counts + i));
      store(a_row + i, keep(counted, load(a_row + i))), store(b_row + i, keep(counted, load(b_row + i)));
    }
  }
};

// Rectangle of an image, columns counted in floats; `columns` is whole vectors and may reach past the image.
struct Block {
  int y, x, rows, columns;
};

// How an image is cut, and where its derivatives lie: with a margin of zeros as wide as the window reaches.
struct Layout {
  int height, length, strips, tiles, tile, halo, pitch;

  explicit Layout(const Image &image)
      : height(image.height),
        length(image.length()),
        strips((height + kBlockRows - 1) / kBlockRows),
        tiles((length + kBlockFloats - 1) / kBlockFloats),
        tile(whole_vectors((length + tiles - 1) / tiles)),
        halo(whole_vectors(kRadius * image.channels)),
        pitch(tile * tiles + 2 * halo) {}

  int blocks() const { return strips * tiles; }
  Block block(int index) const {
    const int y = index / tiles * kBlockRows;
    return {y, index % tiles * tile, std::min(kBlockRows, height - y), tile};
  }
  size_t map_size() const { return static_cast<size_t>(strips * kBlockRows + 2 * kRadius) * pitch; }
  // Where pixel row y and float x of a map lie.
  size_t at(int y, int x) const { return static_cast<size_t>(y + kRadius) * pitch + halo + x; }
  void clear_margins(float *map) const {
    std::fill(map, map + at(0, 0), 0.f);
    for (int y = 0; y < height; y++) {
      std::fill_n(map + at(y, -halo), halo, 0.f);
      std::fill_n(map + at(y, tile * tiles), halo, 0.f);
    }
    std::fill(map + at(height, -halo), map + map_size(), 0.f);
  }
};

// Blurs the rows y .. y + kGroup - 1 of `Fields` images and hands sink(row, i, blurred) their `columns` results, the
// first `rows`. `fields` point `halo` floats left of the first result in row y - kRadius; `temporary` has Fields *
// kGroup rows.
template <int Fields, class Channels, class Sink>
PF_INLINE void blur_group(const float *const *fields, int pitch, int columns, int halo, Channels channels, int rows,
                          float *temporary, Sink &&sink) {
  const int room = columns + 2 * halo;
  for (int f = 0; f < Fields; f++)
    for (int i = 0; i < room; i += W) {
      const float *p = fields[f] + i;
      vf total[kGroup] = {};
#pragma GCC unroll 16
      for (int k = 0; k < kTaps + kGroup - 1; k++) {
        const vf row = load(p + static_cast<ptrdiff_t>(k) * pitch);
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; g++)
          if (k >= g && k - g < kTaps) total[g] += kWindow[k - g] * row;
      }
      for (int g = 0; g < kGroup; g++) store(temporary + static_cast<ptrdiff_t>(f * kGroup + g) * room + i, total[g]);
    }
  for (int g = 0; g < rows; g++)
    for (int i = 0; i < columns; i += W) {
      vf blurred[Fields];
      for (int f = 0; f < Fields; f++) {
        const float *p = temporary + static_cast<ptrdiff_t>(f * kGroup + g) * room + halo + i - kRadius * channels;
        vf total{};
#pragma GCC unroll 11
        for (int k = 0; k < kTaps; k++) total += kWindow[k] * load(p + k * channels);
        blurred[f] = total;
      }
      sink(g, i, blurred);
    }
}

struct Sums {
  double l1 = 0, ssim = 0;
};

// SSIM around W pixels, and its derivatives to S + D (through the means), to the blurred s^2 and to the blurred d^2.
PF_INLINE vf similarity(const vf *blurred, vf &v_means, vf &v_ss, vf &v_dd) {
  const vf S = blurred[0], D = blurred[1], M = S + 1.f, DD = D * D;
  const vf P = max(blurred[2] - S * S, vf{}), Q = max(blurred[3] - DD, vf{});
  const vf B1 = 0.5f * (M * M + DD) + kC1, B2 = 0.5f * (P + Q) + kC2, inverse = reciprocal(B1 * B2);
  const vf inverse1 = inverse * B2, inverse2 = inverse * B1;
  const vf luminance = 1.f - DD * inverse1, structure = 1.f - Q * inverse2;
  v_ss = 0.5f * luminance * Q * inverse2 * inverse2;
  v_dd = v_ss - luminance * inverse2;
  v_means = structure * (D * inverse1 * (D * inverse1 * (M + D) - 2.f)) - 2.f * (S * v_ss + D * v_dd);
  return luminance * structure;
}

// First pass: the two sums of a block, and the derivatives of SSIM in `maps`.
template <class Channels>
Sums first_pass(Channels channels, const Image &image, const Layout &layout, const Block &block, float *const *maps) {
  static thread_local Buffer<float> buffer;
  const int room = block.columns + 2 * layout.halo, rows = kBlockRows + 2 * kRadius;
  const size_t field = static_cast<size_t>(rows) * room;
  float *fields = buffer.need(4 * field + 4 * kGroup * room + kBlockRows * room + 2 * room);
  float *temporary = fields + 4 * field, *counts = temporary + 4 * kGroup * room, *a_row = counts + kBlockRows * room;
  float *b_row = a_row + room, *outside = temporary;
  vf l1{};
  for (int r = 0; r < rows; r++) {
    const int inner = r - kRadius;
    const bool counted = inner >= 0 && inner < block.rows;
    float *count = counted ? counts + inner * room : outside;
    image.read(block.y + inner, block.x - layout.halo, room, a_row, b_row, count);
    float *to = fields + static_cast<size_t>(r) * room;
    for (int i = 0; i < room; i += W) {
      const vf a = load(a_row + i), b = load(b_row + i), s = a + b - 1.f, d = a - b;
      store(to + i, s), store(to + field + i, d), store(to + 2 * field + i, s * s), store(to + 3 * field + i, d * d);
      if (counted && i >= layout.halo && i < layout.halo + block.columns) l1 += abs(d);
    }
  }
  vf ssim{};
  for (int first = 0; first < block.rows; first += kGroup) {
    const size_t from = static_cast<size_t>(first) * room;
    const float *sources[4] = {fields + from, fields + field + from, fields + 2 * field + from,
                               fields + 3 * field + from};
    const int last = std::min(kGroup, block.rows - first);
    blur_group<4>(sources, room, block.columns, layout.halo, channels, last, temporary,
                  [&](int row, int i, const vf *blurred) {
                    vf v_means, v_ss, v_dd;
                    const vf map = similarity(blurred, v_means, v_ss, v_dd);
                    const vm counted = lt(vf{}, load(counts + (first + row) * room + layout.halo + i));
                    const size_t at = layout.at(block.y + first + row, block.x + i);
                    ssim += keep(counted, map);
                    store(maps[0] + at, keep(counted, v_means)), store(maps[1] + at, keep(counted, v_ss)),
                        store(maps[2] + at, keep(counted, v_dd));
                  });
  }
  return {sum(l1), sum(ssim)};
}

// Second pass: blurs the derivatives back and writes the gradient of the loss to a.
template <class Channels>
void second_pass(Channels channels, const Image &image, const Layout &layout, const Block &block,
                 const float *const *maps, float l1_scale, float ssim_scale, float *gradient) {
  static thread_local Buffer<float> buffer;
  const int room = block.columns + 2 * layout.halo;
  float *temporary = buffer.need(3 * kGroup * room + 4 * block.columns);
  float *a_row = temporary + 3 * kGroup * room, *b_row = a_row + block.columns, *counts = b_row + block.columns;
  float *out = counts + block.columns;
  const int written = std::min(block.columns, layout.length - block.x);
  for (int first = 0; first < block.rows; first += kGroup) {
    const size_t from = layout.at(block.y + first - kRadius, block.x - layout.halo);
    const float *sources[3] = {maps[0] + from, maps[1] + from, maps[2] + from};
    const int last = std::min(kGroup, block.rows - first);
    blur_group<3>(sources, layout.pitch, block.columns, layout.halo, channels, last, temporary,
                  [&](int row, int i, const vf *blurred) {
                    const int y = block.y + first + row;
                    if (i == 0) image.read(y, block.x, block.columns, a_row, b_row, counts);
                    const vf a = load(a_row + i), b = load(b_row + i), s = a + b - 1.f, d = a - b;
                    const vf v_ssim = blurred[0] + 2.f * (s * blurred[1] + d * blurred[2]);
                    const vf sign = keep(lt(vf{}, d), broadcast(1.f)) - keep(lt(d, vf{}), broadcast(1.f));
                    store(out + i, keep(lt(vf{}, load(counts + i)), l1_scale * sign - ssim_scale * v_ssim));
                    if (i + W >= block.columns && written > 0)
                      std::copy_n(out, written, gradient + static_cast<size_t>(y) * layout.length + block.x);
                  });
  }
}

// One image's sums; `channels` may be known to the compiler; `l1_scale` and `ssim_scale` are the weight of one value in
// the loss.
template <class Channels>
Sums one_image(Channels channels, const Image &image, float l1_scale, float ssim_scale, float *gradient) {
  static thread_local Buffer<float> buffer;
  const Layout layout(image);
  float *memory = buffer.need(3 * layout.map_size());
  float *const maps[3] = {memory, memory + layout.map_size(), memory + 2 * layout.map_size()};
  for (float *map : maps) layout.clear_margins(map);
  std::vector<Sums> parts(layout.blocks());
  parallel_for(layout.blocks(), 1, [&](int64_t index, int64_t end) {
    for (; index < end; index++)
      parts[index] = first_pass(channels, image, layout, layout.block(static_cast<int>(index)), maps);
  });
  parallel_for(layout.blocks(), 1, [&](int64_t index, int64_t end) {
    for (; index < end; index++)
      second_pass(channels, image, layout, layout.block(static_cast<int>(index)), maps, l1_scale, ssim_scale, gradient);
  });
  Sums sums;
  for (const Sums &part : parts) sums.l1 += part.l1, sums.ssim += part.ssim;
  return sums;
}

// rgb [C, H, W, D]; target the same shape as floats in 0..1 or as bytes, the other one empty; mask [C, H, W] or empty.
// Writes values = (loss, L1, SSIM) and the gradient of the loss to rgb. Where nothing counts, the images are alike.
void photometric_loss(Floats rgb, Floats target_floats, Bytes target_bytes, Bools mask, float ssim_weight,
                      Floats values, Floats gradient) {
  const size_t count = rgb.shape(0), pixels = rgb.shape(1) * rgb.shape(2), floats = pixels * rgb.shape(3);
  const bool bytes = target_bytes.size() > 0, masked = mask.size() > 0;
  const int height = static_cast<int>(rgb.shape(1)), width = static_cast<int>(rgb.shape(2)),
            channels = static_cast<int>(rgb.shape(3));
  const float *a = rgb.data(), *b = target_floats.data();
  const uint8_t *b_bytes = target_bytes.data();
  const bool *m = mask.data();
  float *out = values.data(), *v = gradient.data();
  nb::gil_scoped_release unlocked;
  size_t counted = count * pixels;
  if (masked) counted = static_cast<size_t>(std::count(m, m + count * pixels, true));
  const double scale = counted * channels > 0 ? 1.0 / (static_cast<double>(counted) * channels) : 0.0;
  Sums sums;
  for (size_t c = 0; c < count && floats > 0; c++) {
    const Image image{a + c * floats,
                      bytes ? nullptr : b + c * floats,
                      bytes ? b_bytes + c * floats : nullptr,
                      masked ? m + c * pixels : nullptr,
                      height,
                      width,
                      channels};
    const float l1_scale = static_cast<float>((1.0 - ssim_weight) * scale),
                ssim_scale = static_cast<float>(ssim_weight * scale);
    const Sums part = channels == 3
                          ? one_image(std::integral_constant<int, 3>(), image, l1_scale, ssim_scale, v + c * floats)
                          : one_image(channels, image, l1_scale, ssim_scale, v + c * floats);
    sums.l1 += part.l1, sums.ssim += part.ssim;
  }
  out[1] = static_cast<float>(sums.l1 * scale), out[2] = scale > 0 ? static_cast<float>(sums.ssim * scale) : 1.f;
  out[0] = static_cast<float>((1.0 - ssim_weight) * sums.l1 * scale +
                              (scale > 0 ? ssim_weight * (1.0 - sums.ssim * scale) : 0.0));
}

}  // namespace

void bind_ssim(nb::module_ &m) { m.def("photometric_loss", &photometric_loss); }

}  // namespace pf
