// One Adam step over a parameter in a single pass: four streams read, three written. Bound by memory.
//
// Every value goes through the same vector instructions, ends of rows with the lanes beyond them switched off, so that
// the result does not depend on how the work is cut, and with it not on the number of threads.
#include <algorithm>
#include <cmath>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int64_t kGrainFloats = 16384;

struct Adam {
  float *param, *mean, *square;
  const float *grad;
  int64_t width;  // floats in a row
  float beta1, beta2, rest1, rest2, rate, root_scale, eps;  // rest = 1 - beta; the others include the bias corrections

  PF_INLINE void apply(vf &p, vf g, vf &m, vf &s) const {
    m = beta1 * m + rest1 * g;
    s = beta2 * s + rest2 * (g * g);
    p = p - rate * m / (sqrt(s) * root_scale + eps);
  }

  // The floats begin .. end - 1.
  void run(int64_t begin, int64_t end) const {
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      vf p = load(param + i), m = load(mean + i), s = load(square + i);
      apply(p, load(grad + i), m, s);
      store(param + i, p), store(mean + i, m), store(square + i, s);
    }
    if (i == end) return;
    const int count = static_cast<int>(end - i);
    vf p = load_some(param + i, count), m = load_some(mean + i, count), s = load_some(square + i, count);
    apply(p, load_some(grad + i, count), m, s);
    store_some(param + i, p, count), store_some(mean + i, m, count), store_some(square + i, s, count);
  }

  // The visible ones of at most W rows narrower than a vector: whole vectors, of which the other lanes stay as they
  // are.
  void run_narrow(int64_t row, int rows, const bool *visible) const {
    float lanes[W * W + W];
    for (int r = 0; r < rows; r++)
      store(lanes + r * width, broadcast(visible[row + r]));  // the next row overwrites the excess
    const int floats = rows * static_cast<int>(width);
    for (int first = 0; first < floats; first += W) {
      const int count = std::min(W, floats - first);
      const int64_t i = row * width + first;
      const vm chosen = lt(vf{}, load(lanes + first));
      if (!any(chosen)) continue;
      const vf p = load_some(param + i, count), m = load_some(mean + i, count), s = load_some(square + i, count);
      vf new_p = p, new_m = m, new_s = s;
      apply(new_p, load_some(grad + i, count), new_m, new_s);
      store_some(param + i, select(chosen, new_p, p), count);
      store_some(mean + i, select(chosen, new_m, m), count), store_some(square + i, select(chosen, new_s, s), count);
    }
  }

  void run_rows(int64_t begin, int64_t end, const bool *visible) const {
    if (width < W) {
      for (int64_t row = begin; row < end; row += W)
        run_narrow(row, static_cast<int>(std::min<int64_t>(W, end - row)), visible);
      return;
    }
    for (int64_t row = begin; row < end; row++) {
      if (!visible[row]) continue;
      const int64_t first = row;
      while (row + 1 < end && visible[row + 1]) row++;
      run(first * width, (row + 1) * width);
    }
  }
};

// Arrays of rows x width floats; where a mask of rows is given, the others are left as they are.
void adam_step(Floats param, Floats grad, Floats mean, Floats square, Bools rows, int64_t width, double lr,
               double beta1, double beta2, double eps, int64_t step) {
  const double correction1 = 1.0 - std::pow(beta1, step), correction2 = 1.0 - std::pow(beta2, step);
  const auto single = [](double x) { return static_cast<float>(x); };
  const Adam adam{param.data(),
                  mean.data(),
                  square.data(),
                  grad.data(),
                  width,
                  single(beta1),
                  single(beta2),
                  single(1.0 - beta1),
                  single(1.0 - beta2),
                  single(lr / correction1),
                  single(1.0 / std::sqrt(correction2)),
                  single(eps)};
  const bool *visible = rows.size() > 0 ? rows.data() : nullptr;
  const int64_t count = width > 0 ? static_cast<int64_t>(param.size()) / width : 0;
  nb::gil_scoped_release unlocked;
  parallel_for(count, std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(width, 1)),
               [&](int64_t begin, int64_t end) {
                 if (visible) adam.run_rows(begin, end, visible);
                 else adam.run(begin * width, end * width);
               });
}

}  // namespace

void bind_adam(nb::module_ &m) { m.def("adam_step", &adam_step); }

}  // namespace pf
