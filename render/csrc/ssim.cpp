// The photometric loss (1 - w) L1 + w (1 - SSIM) and its gradient image, in one call.
//
// SSIM needs the blurred sums s = a + b and differences d = a - b, and their squares: four images instead of five, because only
// a^2 + b^2 and ab occur. Blurs are separable. Rows pass through a ring of eleven horizontally blurred ones, so that a strip's
// working set stays in the second-level cache. Channels are interleaved: a tap k pixels away is k * channels floats away.
#include <algorithm>
#include <cmath>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int kRadius = 5, kTaps = 2 * kRadius + 1;
constexpr float kSigma = 1.5f, kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;

struct Window {
  float taps[kTaps];
  Window() {
    float total = 0.f;
    for (int k = 0; k < kTaps; k++) total += taps[k] = std::exp(-(k - kRadius) * (k - kRadius) / (2 * kSigma * kSigma));
    for (float &tap : taps) tap /= total;
  }
};
const Window kWindow;

struct Images {
  const float *a, *b_floats;
  const uint8_t *b_bytes;  // one of the two b's is null
  const bool *mask;        // null: every pixel counts
  int height, width, channels;

  int length() const { return width * channels; }                           // floats in a row
  int padded() const { return (length() + W - 1) / W * W; }                 // ... as whole vectors
  int halo() const { return (kRadius * channels + W - 1) / W * W; }         // zeros on either side
  int room() const { return padded() + 2 * halo(); }

  // Row y of both images, zero outside the mask and outside the image.
  void load_row(int y, float *a_row, float *b_row) const {
    const size_t at = static_cast<size_t>(y) * length();
    std::copy_n(a + at, length(), a_row);
    if (b_floats) std::copy_n(b_floats + at, length(), b_row);
    else
      for (int i = 0; i < length(); i++) b_row[i] = b_bytes[at + i] * (1.f / 255.f);
    std::fill(a_row + length(), a_row + padded(), 0.f);
    std::fill(b_row + length(), b_row + padded(), 0.f);
    if (!mask) return;
    for (int x = 0; x < width; x++)
      if (!mask[static_cast<size_t>(y) * width + x])
        for (int c = 0; c < channels; c++) a_row[x * channels + c] = b_row[x * channels + c] = 0.f;
  }
};

// Blurs a row that has `halo` zeros on either side.
void blur_row(const float *row, int length, int channels, float *out) {
  for (int i = 0; i < length; i += W) {
    vf total = kWindow.taps[0] * load(row + i - kRadius * channels);
    for (int k = 1; k < kTaps; k++) total += kWindow.taps[k] * load(row + i + (k - kRadius) * channels);
    store(out + i, total);
  }
}

// Eleven rows of each of `Fields` images, addressed by row number.
template <int Fields>
class Ring {
 public:
  explicit Ring(int length) : length_(length), memory_(static_cast<size_t>(Fields) * kTaps * length, 0.f) {}
  float *row(int field, int y) { return memory_.data() + (static_cast<size_t>(field) * kTaps + (y + kTaps) % kTaps) * length_; }
  PF_INLINE vf blurred(const float *const *rows, int i) const {
    vf total = kWindow.taps[0] * load(rows[0] + i);
    for (int k = 1; k < kTaps; k++) total += kWindow.taps[k] * load(rows[k] + i);
    return total;
  }
  // The rows y - 5 .. y + 5 of a field.
  void around(int field, int y, const float **rows) {
    for (int k = 0; k < kTaps; k++) rows[k] = row(field, y + k - kRadius);
  }
  void clear(int y) {
    for (int field = 0; field < Fields; field++) std::fill_n(row(field, y), length_, 0.f);
  }

 private:
  int length_;
  std::vector<float> memory_;
};

struct Sums {
  double l1 = 0, ssim = 0;
};

// First pass over rows [begin, end): the two sums, and the derivatives of SSIM to the blurred a, a^2 and ab.
Sums first_pass(const Images &in, int begin, int end, float *v_mean, float *v_square, float *v_product) {
  const int length = in.length(), padded = in.padded(), halo = in.halo();
  std::vector<float> memory(4 * static_cast<size_t>(in.room()), 0.f);
  std::vector<float> a_row(padded), b_row(padded);
  float *fields[4];
  for (int f = 0; f < 4; f++) fields[f] = memory.data() + static_cast<size_t>(f) * in.room() + halo;
  Ring<4> ring(padded);
  Sums sums;
  for (int y = begin - kRadius; y < end + kRadius; y++) {
    if (y < 0 || y >= in.height) {
      ring.clear(y);
    } else {
      in.load_row(y, a_row.data(), b_row.data());
      float l1 = 0.f;
      for (int i = 0; i < padded; i += W) {
        const vf a = load(&a_row[i]), b = load(&b_row[i]), s = a + b, d = a - b;
        store(fields[0] + i, s), store(fields[1] + i, d), store(fields[2] + i, s * s), store(fields[3] + i, d * d);
        l1 += sum(abs(d));
      }
      if (y >= begin && y < end) sums.l1 += l1;
      for (int f = 0; f < 4; f++) blur_row(fields[f], padded, in.channels, ring.row(f, y));
    }
    const int done = y - kRadius;
    if (done < begin) continue;
    const float *rows[4][kTaps];
    for (int f = 0; f < 4; f++) ring.around(f, done, rows[f]);
    const size_t at = static_cast<size_t>(done) * padded;
    float ssim = 0.f;
    for (int i = 0; i < padded; i += W) {
      const vf s = ring.blurred(rows[0], i), d = ring.blurred(rows[1], i);
      const vf ss = ring.blurred(rows[2], i), dd = ring.blurred(rows[3], i);
      const vf mean_a = 0.5f * (s + d), mean_b = 0.5f * (s - d);
      const vf product = 0.25f * (s * s - d * d), squares = 0.5f * (s * s + d * d);  // of the means
      const vf A1 = 2.f * product + kC1, A2 = 2.f * (0.25f * (ss - dd) - product) + kC2;
      const vf B1 = squares + kC1, B2 = (0.5f * (ss + dd) - squares) + kC2;
      const vf inverse = 1.f / (B1 * B2), map = A1 * A2 * inverse;
      const vf to_product = 2.f * A1 * inverse, to_square = -map / B2;
      const vf to_mean = 2.f * mean_b * (A2 - A1) * inverse - 2.f * mean_a * map * (1.f / B1 - 1.f / B2);
      store(v_mean + at + i, to_mean), store(v_square + at + i, to_square), store(v_product + at + i, to_product);
      float lanes[W];
      store(lanes, map);
      for (int lane = 0; lane < W && i + lane < length; lane++) {
        const bool counts = !in.mask || in.mask[static_cast<size_t>(done) * in.width + (i + lane) / in.channels];
        if (counts) ssim += lanes[lane];
        else v_mean[at + i + lane] = v_square[at + i + lane] = v_product[at + i + lane] = 0.f;
      }
      for (int lane = std::max(0, length - i); lane < W; lane++)
        v_mean[at + i + lane] = v_square[at + i + lane] = v_product[at + i + lane] = 0.f;
    }
    sums.ssim += ssim;
  }
  return sums;
}

// Second pass: blurs the three derivatives back and writes the gradient of the loss to a.
void second_pass(const Images &in, int begin, int end, const float *const *derivatives, float l1_scale, float ssim_scale,
                 float *gradient) {
  const int length = in.length(), padded = in.padded(), halo = in.halo();
  std::vector<float> memory(static_cast<size_t>(in.room()), 0.f), a_row(padded), b_row(padded), out(padded);
  float *row = memory.data() + halo;
  Ring<3> ring(padded);
  for (int y = begin - kRadius; y < end + kRadius; y++) {
    if (y < 0 || y >= in.height) {
      ring.clear(y);
    } else {
      for (int f = 0; f < 3; f++) {
        std::copy_n(derivatives[f] + static_cast<size_t>(y) * padded, padded, row);
        blur_row(row, padded, in.channels, ring.row(f, y));
      }
    }
    const int done = y - kRadius;
    if (done < begin) continue;
    in.load_row(done, a_row.data(), b_row.data());
    const float *rows[3][kTaps];
    for (int f = 0; f < 3; f++) ring.around(f, done, rows[f]);
    for (int i = 0; i < padded; i += W) {
      const vf a = load(&a_row[i]), b = load(&b_row[i]);
      const vf v_ssim = ring.blurred(rows[0], i) + 2.f * a * ring.blurred(rows[1], i) + b * ring.blurred(rows[2], i);
      const vf sign = keep(lt(b, a), broadcast(1.f)) - keep(lt(a, b), broadcast(1.f));
      store(&out[i], l1_scale * sign - ssim_scale * v_ssim);
    }
    float *to = gradient + static_cast<size_t>(done) * length;
    std::copy_n(out.data(), length, to);
    if (in.mask)
      for (int i = 0; i < length; i++)
        if (!in.mask[static_cast<size_t>(done) * in.width + i / in.channels]) to[i] = 0.f;
  }
}

// Adds one image's part; `scale` is 1 / number of values that count in the whole batch.
Sums one_image(const Images &in, float ssim_weight, double scale, float *gradient) {
  static thread_local Buffer<float> buffer;
  const size_t plane = static_cast<size_t>(in.height) * in.padded();
  float *memory = buffer.need(3 * plane);
  const float *derivatives[3] = {memory, memory + plane, memory + 2 * plane};
  const int strip = std::max(16, (in.height + 2 * num_threads() - 1) / (2 * num_threads()));
  const int strips = (in.height + strip - 1) / strip;
  std::vector<Sums> parts(strips);
  parallel_for(strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int begin = static_cast<int>(i) * strip, end = std::min(begin + strip, in.height);
      parts[i] = first_pass(in, begin, end, memory, memory + plane, memory + 2 * plane);
    }
  });
  const float l1_scale = static_cast<float>((1.f - ssim_weight) * scale), ssim_scale = static_cast<float>(ssim_weight * scale);
  parallel_for(strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int begin = static_cast<int>(i) * strip, end = std::min(begin + strip, in.height);
      second_pass(in, begin, end, derivatives, l1_scale, ssim_scale, gradient);
    }
  });
  Sums sums;
  for (const Sums &part : parts) sums.l1 += part.l1, sums.ssim += part.ssim;
  return sums;
}

using Bytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;

// rgb [C, H, W, D]; target the same shape as floats in 0..1 or as bytes, the other one empty; mask [C, H, W] or empty.
// Writes values = (loss, L1, SSIM) and the gradient of the loss to rgb.
void photometric_loss(Floats rgb, Floats target_floats, Bytes target_bytes, Bools mask, float ssim_weight, Floats values,
                      Floats gradient) {
  const size_t count = rgb.shape(0), pixels = rgb.shape(1) * rgb.shape(2), floats = pixels * rgb.shape(3);
  const bool bytes = target_bytes.size() > 0, masked = mask.size() > 0;
  const int height = static_cast<int>(rgb.shape(1)), width = static_cast<int>(rgb.shape(2)), channels = static_cast<int>(rgb.shape(3));
  const float *a = rgb.data(), *b = target_floats.data();
  const uint8_t *b_bytes = target_bytes.data();
  const bool *m = mask.data();
  float *out = values.data(), *v = gradient.data();
  nb::gil_scoped_release unlocked;
  size_t counted = count * pixels;
  if (masked) counted = static_cast<size_t>(std::count(m, m + count * pixels, true));
  const double scale = 1.0 / (std::max<size_t>(counted, 1) * static_cast<double>(channels));
  Sums sums;
  for (size_t c = 0; c < count; c++) {
    const Images in{a + c * floats, bytes ? nullptr : b + c * floats, bytes ? b_bytes + c * floats : nullptr,
                    masked ? m + c * pixels : nullptr, height, width, channels};
    const Sums part = one_image(in, ssim_weight, scale, v + c * floats);
    sums.l1 += part.l1, sums.ssim += part.ssim;
  }
  out[1] = static_cast<float>(sums.l1 * scale), out[2] = static_cast<float>(sums.ssim * scale);
  out[0] = (1.f - ssim_weight) * out[1] + ssim_weight * (1.f - out[2]);
}

}  // namespace

void bind_ssim(nb::module_ &m) { m.def("photometric_loss", &photometric_loss); }

}  // namespace pf
