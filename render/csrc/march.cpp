// Samples along rays: found in an occupancy grid, and blended front to back; their gradients.
//
// Rays are independent, each is one thread's, and so no result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "constants.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int kRays = 64;       // handed to a thread at a time
constexpr int kBlock = 4;       // cells along an edge of what one word of the grid describes
constexpr float kTauMax = 80.f;  // optical depth at which light is gone
constexpr int64_t kMostSteps = 1 << 24;

// Steps that grow with the distance: of length `step`, or of `cone` times the distance where that is more.
class Steps {
 public:
  Steps(float step, float cone)
      : step_(step),
        cone_(cone),
        per_step_(1.f / step),
        turn_(cone > 0.f ? step / cone : INFINITY),
        growth_(std::exp(cone)) {}

  float cone() const { return cone_; }
  float until(float t) const { return t <= turn_ ? t * per_step_ : (1.f + std::log(t / turn_)) / cone_; }
  float distance(float steps) const {
    return steps * step_ <= turn_ ? steps * step_ : turn_ * std::exp(steps * cone_ - 1.f);
  }
  // The distance one step behind `start`, which is where so many `steps` end.
  float next(float start, float steps) const { return start > turn_ ? start * growth_ : distance(steps + 1.f); }

 private:
  float step_, cone_, per_step_, turn_, growth_;
};

struct Grid {
  const int64_t *bits;
  int levels, side;                 // blocks along an axis
  float width;                      // of a cell, where the cube of level 0 reaches from -1 to 1
  float center[3], half[3];         // of level 0
  std::vector<uint8_t> is_skipped;  // a group of 4 x 4 x 4 blocks: empty, and nothing of a finer level in it

  Grid(Longs words, Floats aabb)
      : bits(words.data()),
        levels(static_cast<int>(words.shape(0))),
        side(static_cast<int>(words.shape(1))),
        width(2.f / (side * kBlock)) {
    for (int d = 0; d < 3; d++) {
      const float low = aabb.data()[d], high = aabb.data()[3 + d];
      center[d] = 0.5f * (low + high), half[d] = 0.5f * (high - low);
    }
    is_skipped.assign(static_cast<size_t>(levels) * groups() * groups() * groups(), 1);
    for (int64_t row = 0; row < int64_t{levels} * side * side; row++) {
      const int level = static_cast<int>(row / (side * side)), x = row / side % side, y = row % side;
      for (int z = 0; z < side; z++)
        if (bits[row * side + z] || (level > 0 && is_inner(x) && is_inner(y) && is_inner(z)))
          is_skipped[group(level, x, y, z)] = 0;
    }
  }

  int groups() const { return side / kBlock; }  // along an axis
  bool is_inner(int block) const { return block >= side / 4 && block < side - side / 4; }
  int64_t group(int level, int x, int y, int z) const {
    return ((int64_t{level} * groups() + x / kBlock) * groups() + y / kBlock) * groups() + z / kBlock;
  }
};

// A ray in units in which level 0 is the cube from -1 to 1.
struct Ray {
  float origin[3], dir[3], inverse[3], near, far;

  Ray(const Grid &grid, const float *from, const float *along, const float *range) : near(range[0]), far(range[1]) {
    const float outer = static_cast<float>(1 << (grid.levels - 1));
    for (int d = 0; d < 3; d++) {
      const float dir_d = std::fabs(along[d]) < 1e-12f ? std::copysign(1e-12f, along[d]) : along[d];
      origin[d] = (from[d] - grid.center[d]) / grid.half[d], dir[d] = dir_d / grid.half[d];
      inverse[d] = grid.half[d] / dir_d;
      const float a = (-outer - origin[d]) * inverse[d], b = (outer - origin[d]) * inverse[d];
      near = std::max(near, std::min(a, b)), far = std::min(far, std::max(a, b));
      if (!std::isfinite(from[d] + along[d])) near = far = 0.f;
    }
  }

  // Whether the cell at distance t is occupied; where not, `exit` is at most the distance at which the ray leaves the
  // empty cell, or what is empty around it.
  bool is_occupied(const Grid &grid, float t, float *exit) const {
    float unit[3], reach = 0.f;
    for (int d = 0; d < 3; d++) unit[d] = origin[d] + t * dir[d], reach = std::max(reach, std::fabs(unit[d]));
    int level = 0;
    float scale = 1.f, per_unit = 0.5f * grid.side * kBlock;  // cells in a unit of this level
    const float middle = per_unit;
    while (reach > scale && level < grid.levels - 1) level++, scale *= 2.f, per_unit *= 0.5f;
    const int res = grid.side * kBlock;
    int cell[3], block[3];
    for (int d = 0; d < 3; d++) {
      cell[d] = std::clamp(static_cast<int>(unit[d] * per_unit + middle), 0, res - 1);
      block[d] = cell[d] / kBlock;
    }
    const int64_t index = ((int64_t{level} * grid.side + block[0]) * grid.side + block[1]) * grid.side + block[2];
    const uint64_t word = static_cast<uint64_t>(grid.bits[index]);
    const int bit = cell[0] % kBlock * 16 + cell[1] % kBlock * 4 + cell[2] % kBlock;
    if (word >> bit & 1) return true;
    const bool is_far = grid.is_skipped[grid.group(level, block[0], block[1], block[2])];
    const int size = is_far ? kBlock * kBlock : word ? 1 : kBlock;
    const float width = grid.width * scale;
    *exit = far;
    for (int d = 0; d < 3; d++) {
      const int border = (cell[d] / size + (dir[d] > 0.f)) * size;
      *exit = std::min(*exit, ((border - middle) * width - origin[d]) * inverse[d]);
    }
    return false;
  }
};

struct March {
  const float *origins, *dirs, *ranges, *jitter;
  Grid grid;
  Steps steps;
  int64_t rays;
};

// The steps along one ray whose midpoints are occupied, one after the other.
class Walk {
 public:
  Walk(const March &in, int64_t ray)
      : in_(in), ray_(in.grid, in.origins + 3 * ray, in.dirs + 3 * ray, in.ranges + 2 * ray) {
    if (!(ray_.far > ray_.near)) return;
    const float first = in.steps.until(ray_.near), jitter = in.jitter[ray];
    edge_ = first - jitter;
    count_ = static_cast<int64_t>(std::min(std::ceil(in.steps.until(ray_.far) - first + jitter), float{kMostSteps}));
  }

  bool next(float *start, float *end) {
    const Steps &steps = in_.steps;
    const float guard = 0.5f + 0.01f + steps.cone();  // a step too early costs a look, one too late would be missed
    while (k_ < count_) {
      const float from = steps.distance(edge_ + k_);
      *start = std::max(from, ray_.near), *end = std::min(steps.next(from, edge_ + k_), ray_.far);
      float exit;
      if (ray_.is_occupied(in_.grid, 0.5f * (*start + *end), &exit)) {
        k_++;
        return true;
      }
      k_ = std::max(k_ + 1, static_cast<int64_t>(std::ceil(steps.until(exit) - edge_ - guard)));
    }
    return false;
  }

 private:
  const March &in_;
  const Ray ray_;
  float edge_ = 0.f;
  int64_t k_ = 0, count_ = 0;
};

// What was found for each kRays rays, until it is known where it belongs.
struct Piece {
  float start, end;
};
using Found = std::vector<std::vector<Piece>>;

// Writes the runs of each ray; returns the number of samples and what `march_fill` takes.
nb::tuple march_count(Floats origins, Floats dirs, Floats ranges, Floats jitter, Longs bits, Floats aabb, float step,
                      float cone, int64_t most, Longs packed_info) {
  const March in{origins.data(),
                 dirs.data(),
                 ranges.data(),
                 jitter.data(),
                 Grid(bits, aabb),
                 Steps(step, cone),
                 static_cast<int64_t>(origins.shape(0))};
  int64_t *runs = packed_info.data(), total = 0;
  auto found = std::make_unique<Found>((in.rays + kRays - 1) / kRays);
  {
    nb::gil_scoped_release unlocked;
    parallel_for(static_cast<int64_t>(found->size()), 1, [&](int64_t chunk, int64_t end) {
      for (; chunk < end; chunk++) {
        std::vector<Piece> &pieces = (*found)[chunk];
        for (int64_t ray = chunk * kRays; ray < std::min((chunk + 1) * kRays, in.rays); ray++) {
          Walk walk(in, ray);
          int64_t count = 0;
          for (Piece piece; count < most && walk.next(&piece.start, &piece.end); count++) pieces.push_back(piece);
          runs[2 * ray + 1] = count;
        }
      }
    });
    for (int64_t ray = 0; ray < in.rays; ray++) runs[2 * ray] = total, total += runs[2 * ray + 1];
  }
  const auto destroy = [](void *p) noexcept { delete static_cast<Found *>(p); };
  return nb::make_tuple(total, nb::capsule(found.release(), destroy));
}

void march_fill(nb::capsule handle, Longs packed_info, Floats t_starts, Floats t_ends, Longs ray_indices) {
  const Found &found = *static_cast<const Found *>(handle.data());
  const int64_t *runs = packed_info.data(), rays = packed_info.shape(0);
  float *starts = t_starts.data(), *ends = t_ends.data();
  int64_t *indices = ray_indices.data();
  nb::gil_scoped_release unlocked;
  parallel_for(static_cast<int64_t>(found.size()), 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; chunk++) {
      const Piece *piece = found[chunk].data();
      for (int64_t ray = chunk * kRays; ray < std::min((chunk + 1) * kRays, rays); ray++)
        for (int64_t i = runs[2 * ray]; i < runs[2 * ray] + runs[2 * ray + 1]; i++, piece++)
          starts[i] = piece->start, ends[i] = piece->end, indices[i] = ray;
    }
  });
}

struct Medium {
  const float *sigmas, *features, *starts, *ends;
  const int64_t *runs;
  const float *light;
  int64_t rays;
  int dims;

  float mid(int64_t i) const { return starts[i] + 0.5f * (ends[i] - starts[i]); }
};

// 1 - exp(-sigma dt) of the samples [begin, end).
PF_INLINE void absorb(const Medium &in, int64_t begin, int64_t end, float *alphas) {
  for (int64_t i = begin; i < end; i += W) {
    const int filled = static_cast<int>(std::min<int64_t>(W, end - i));
    const vf length = load_some(in.ends + i, filled) - load_some(in.starts + i, filled);
    const vf tau = min(max(load_some(in.sigmas + i, filled) * length, vf{}), broadcast(kTauMax));  // NaN becomes 0
    // The difference of 1 and an exponential has no correct digits where little is absorbed
    const vf series = tau * (1.f - tau * (0.5f - tau * (1.f / 6 - tau * (1.f / 24 - tau * (1.f / 120 - tau / 720.f)))));
    store_some(alphas + i - begin, select(lt(tau, broadcast(0.25f)), series, 1.f - exp2(tau * -kLog2e)), filled);
  }
}

// Calls visit(ray, begin, end, alphas) for each ray with the samples [begin, end) and what these absorb.
template <class Visit>
void for_each_ray(const Medium &in, Visit visit) {
  parallel_for(in.rays, kRays, [&](int64_t first, int64_t last) {
    static thread_local Buffer<float> room;
    for (; first < last; first += kRays) {
      const int64_t stop = std::min(last, first + kRays), begin = in.runs[2 * first];
      const int64_t end = in.runs[2 * stop - 2] + in.runs[2 * stop - 1];
      float *alphas = room.need(static_cast<size_t>(end - begin));
      absorb(in, begin, end, alphas);
      for (int64_t ray = first; ray < stop; ray++) {
        const int64_t start = in.runs[2 * ray];
        visit(ray, start, start + in.runs[2 * ray + 1], alphas + (start - begin));
      }
    }
  });
}

struct Blended {
  float *features, *alpha, *moment, *median, *weights;
};

// Channels: how many, or 0 where that is known at run time only.
template <int Channels>
void blend(const Medium &in, const Blended &out) {
  const int dims = Channels ? Channels : in.dims;
  for_each_ray(in, [&](int64_t ray, int64_t begin, int64_t end, const float *alphas) {
    float trans = in.light[ray], alpha = 0.f, moment = 0.f, median = 0.f, local[Channels ? Channels : 1] = {};
    float *blended = Channels ? local : out.features + ray * dims;
    for (int d = 0; d < dims; d++) blended[d] = 0.f;
    int64_t i = begin;
    for (; i < end && trans > kTransMin; i++) {
      const float weight = trans * alphas[i - begin], after = trans - weight;
      if (trans > 0.5f && after <= 0.5f) {
        const float length = in.ends[i] - in.starts[i];
        median =
            in.starts[i] + length * std::min(std::log(2.f * trans) / std::min(in.sigmas[i] * length, kTauMax), 1.f);
      }
      out.weights[i] = weight;
      alpha += weight, moment += weight * in.mid(i);
      for (int d = 0; d < dims; d++) blended[d] += weight * in.features[i * dims + d];
      trans = after;
    }
    std::fill(out.weights + i, out.weights + end, 0.f);
    out.alpha[ray] = alpha, out.moment[ray] = moment, out.median[ray] = median;
    if (Channels)
      for (int d = 0; d < dims; d++) out.features[ray * dims + d] = blended[d];
  });
}

struct Upstream {
  const float *features, *alpha, *moment, *weights;
};

// Back to front: a denser sample takes light from all behind it.
template <int Channels>
void blend_vjp(const Medium &in, const Upstream &v, float *v_sigmas, float *v_features) {
  const int dims = Channels ? Channels : in.dims;
  for_each_ray(in, [&](int64_t ray, int64_t begin, int64_t end, const float *alphas) {
    static thread_local Buffer<float> room;
    float *trans = room.need(static_cast<size_t>(end - begin + 1));
    trans[0] = in.light[ray];
    int64_t stop = begin;
    for (; stop < end && trans[stop - begin] > kTransMin; stop++)
      trans[stop - begin + 1] = trans[stop - begin] - trans[stop - begin] * alphas[stop - begin];
    std::fill(v_sigmas + stop, v_sigmas + end, 0.f);
    std::fill(v_features + stop * dims, v_features + end * dims, 0.f);
    const float *v_blended = v.features + ray * dims;
    float behind = 0.f;  // sum of weight * worth of the samples behind
    for (int64_t i = stop - 1; i >= begin; i--) {
      const float weight = trans[i - begin] * alphas[i - begin];
      float worth = v.alpha[ray] + v.moment[ray] * in.mid(i) + v.weights[i];
      for (int d = 0; d < dims; d++) {
        worth += v_blended[d] * in.features[i * dims + d];
        v_features[i * dims + d] = weight * v_blended[d];
      }
      const float length = in.ends[i] - in.starts[i], tau = in.sigmas[i] * length;
      v_sigmas[i] = tau >= 0.f && tau <= kTauMax ? length * (trans[i - begin + 1] * worth - behind) : 0.f;
      behind += weight * worth;
    }
  });
}

Medium make_medium(Floats sigmas, Floats features, Floats t_starts, Floats t_ends, Longs packed_info, Floats light) {
  return {sigmas.data(),
          features.data(),
          t_starts.data(),
          t_ends.data(),
          packed_info.data(),
          light.data(),
          static_cast<int64_t>(packed_info.shape(0)),
          static_cast<int>(features.shape(1))};
}

void composite_samples_forward(Floats sigmas, Floats features, Floats t_starts, Floats t_ends, Longs packed_info,
                               Floats light, Floats blended, Floats alpha, Floats moment, Floats median,
                               Floats weights) {
  const Medium in = make_medium(sigmas, features, t_starts, t_ends, packed_info, light);
  const Blended out{blended.data(), alpha.data(), moment.data(), median.data(), weights.data()};
  nb::gil_scoped_release unlocked;
  in.dims == 3 ? blend<3>(in, out) : blend<0>(in, out);
}

void composite_samples_backward(Floats sigmas, Floats features, Floats t_starts, Floats t_ends, Longs packed_info,
                                Floats light, Floats v_blended, Floats v_alpha, Floats v_moment, Floats v_weights,
                                Floats v_sigmas, Floats v_features) {
  const Medium in = make_medium(sigmas, features, t_starts, t_ends, packed_info, light);
  const Upstream v{v_blended.data(), v_alpha.data(), v_moment.data(), v_weights.data()};
  float *to_sigmas = v_sigmas.data(), *to_features = v_features.data();
  nb::gil_scoped_release unlocked;
  in.dims == 3 ? blend_vjp<3>(in, v, to_sigmas, to_features) : blend_vjp<0>(in, v, to_sigmas, to_features);
}

struct Spread {
  const float *weights, *starts, *ends;
  const int64_t *runs;
  int64_t rays;

  float mid(int64_t i) const { return 0.5f * (starts[i] + ends[i]); }
};

// The distance of midpoint i to all weight in front of it is carried along the ray: from one midpoint to the next it
// grows by that weight times the way.
void spread_of(const Spread &in, float *loss) {
  parallel_for(in.rays, kRays, [&](int64_t ray, int64_t last) {
    for (; ray < last; ray++) {
      const int64_t begin = in.runs[2 * ray], end = begin + in.runs[2 * ray + 1];
      float before = 0.f, away = 0.f, pairs = 0.f, own = 0.f;
      for (int64_t i = begin; i < end; i++) {
        if (i > begin) away += before * (in.mid(i) - in.mid(i - 1));
        pairs += in.weights[i] * away;
        own += in.weights[i] * in.weights[i] * (in.ends[i] - in.starts[i]);
        before += in.weights[i];
      }
      loss[ray] = 2.f * pairs + own / 3.f;
    }
  });
}

void spread_vjp(const Spread &in, const float *v_loss, float *v_weights) {
  parallel_for(in.rays, kRays, [&](int64_t ray, int64_t last) {
    for (; ray < last; ray++) {
      const int64_t begin = in.runs[2 * ray], end = begin + in.runs[2 * ray + 1];
      float sum = 0.f, away = 0.f;
      for (int64_t i = begin; i < end; i++) {
        if (i > begin) away += sum * (in.mid(i) - in.mid(i - 1));
        sum += in.weights[i];
        v_weights[i] = v_loss[ray] * (2.f * away + 2.f / 3.f * in.weights[i] * (in.ends[i] - in.starts[i]));
      }
      sum = away = 0.f;
      for (int64_t i = end - 1; i >= begin; i--) {
        if (i < end - 1) away += sum * (in.mid(i + 1) - in.mid(i));
        sum += in.weights[i];
        v_weights[i] += v_loss[ray] * 2.f * away;
      }
    }
  });
}

Spread make_spread(Floats weights, Floats t_starts, Floats t_ends, Longs packed_info) {
  return {weights.data(), t_starts.data(), t_ends.data(), packed_info.data(),
          static_cast<int64_t>(packed_info.shape(0))};
}

void distortion_forward(Floats weights, Floats t_starts, Floats t_ends, Longs packed_info, Floats loss) {
  const Spread in = make_spread(weights, t_starts, t_ends, packed_info);
  float *result = loss.data();
  nb::gil_scoped_release unlocked;
  spread_of(in, result);
}

void distortion_backward(Floats weights, Floats t_starts, Floats t_ends, Longs packed_info, Floats v_loss,
                         Floats v_weights) {
  const Spread in = make_spread(weights, t_starts, t_ends, packed_info);
  const float *upstream = v_loss.data();
  float *result = v_weights.data();
  nb::gil_scoped_release unlocked;
  spread_vjp(in, upstream, result);
}

}  // namespace

void bind_march(nb::module_ &m) {
  m.def("march_count", &march_count);
  m.def("march_fill", &march_fill);
  m.def("composite_samples_forward", &composite_samples_forward);
  m.def("composite_samples_backward", &composite_samples_backward);
  m.def("distortion_forward", &distortion_forward);
  m.def("distortion_backward", &distortion_backward);
}

}  // namespace pf
