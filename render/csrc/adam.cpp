// One Adam step over a parameter in a single pass: four streams read, three written.
#include <cmath>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

struct Step {
  float beta1, beta2, rate, root_scale, eps;  // rate = lr / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t)

  template <class T>
  PF_INLINE void apply(T &param, T grad, T &mean, T &square) const {
    mean = beta1 * mean + (1.f - beta1) * grad;
    square = beta2 * square + (1.f - beta2) * grad * grad;
    param = param - rate * mean / (sqrt(square) * root_scale + eps);
  }

  void run(float *param, const float *grad, float *mean, float *square, int64_t begin, int64_t end) const {
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      vf p = load(param + i), m = load(mean + i), s = load(square + i);
      apply(p, load(grad + i), m, s);
      store(param + i, p), store(mean + i, m), store(square + i, s);
    }
    for (; i < end; i++) apply(param[i], grad[i], mean[i], square[i]);
  }
};

// Flat arrays of `rows` x `width` values; where a mask of rows is given, the others are not touched.
void adam_step(Floats param, Floats grad, Floats mean, Floats square, Bools rows, int64_t width, float lr, float beta1,
               float beta2, float eps, int64_t step) {
  const Step adam{beta1, beta2, static_cast<float>(lr / (1.0 - std::pow(static_cast<double>(beta1), step))),
                  static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(static_cast<double>(beta2), step))), eps};
  float *p = param.data(), *m = mean.data(), *s = square.data();
  const float *g = grad.data();
  const bool *visible = rows.size() > 0 ? rows.data() : nullptr;
  const int64_t count = width > 0 ? static_cast<int64_t>(param.size()) / width : 0;
  nb::gil_scoped_release unlocked;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    if (!visible) return adam.run(p, g, m, s, begin * width, end * width);
    for (int64_t row = begin; row < end; row++) {
      if (!visible[row]) continue;
      int64_t last = row + 1;
      while (last < end && visible[last]) last++;
      adam.run(p, g, m, s, row * width, last * width);
      row = last;
    }
  });
}

}  // namespace

void bind_adam(nb::module_ &m) { m.def("adam_step", &adam_step); }

}  // namespace pf
