// Planes of .pfz read fast (export/compression/pfz_models.py has the specification, which gives the same integers).
#include <algorithm>
#include <cstring>
#include <vector>
#include "arrays.h"
#include "bindings.h"

namespace pf {
namespace {

using Words = nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>;
using States = nb::ndarray<uint32_t, nb::c_contig, nb::device::cpu>;

constexpr int kTotalBits = 12, kTotal = 1 << kTotalBits;
constexpr uint32_t kStateMin = 1u << 16;
constexpr int64_t kSeen = 32, kBlock = 1 << 14;

// Counts of each symbol in each context, and what a state's low bits mean by them.
class Model {
 public:
  Model(const Longs &start, int64_t contexts) : contexts_(contexts), size_(static_cast<int>(start.shape(0))) {
    counts_.resize(contexts_ * size_), frequency_.resize(contexts_ * size_), below_.resize(contexts_ * size_);
    symbols_.resize(contexts_ * kTotal), changed_.assign(contexts_, true);
    for (int64_t c = 0; c < contexts_; c++) std::copy_n(start.data(), size_, counts_.begin() + c * size_);
  }
  void update() {
    for (int64_t c = 0; c < contexts_; c++)
      if (changed_[c]) update(c);
  }
  void add(int64_t context, int symbol) { counts_[context * size_ + symbol] += kSeen, changed_[context] = true; }
  // The symbol of `state`, which moves on.
  int take(int64_t context, uint32_t &state) const {
    const uint32_t slot = state & (kTotal - 1);
    const int symbol = symbols_[context * kTotal + slot];
    const int64_t at = context * size_ + symbol;
    state = frequency_[at] * (state >> kTotalBits) + slot - below_[at];
    return symbol;
  }

 private:
  void update(int64_t context) {
    const int64_t *counts = counts_.data() + context * size_;
    uint32_t *frequency = frequency_.data() + context * size_, *below = below_.data() + context * size_;
    int64_t sum = 0;
    int most = 0;
    for (int s = 0; s < size_; s++) {
      sum += counts[s];
      if (counts[s] > counts[most]) most = s;
    }
    uint32_t used = 0;
    for (int s = 0; s < size_; s++)
      used += frequency[s] = static_cast<uint32_t>(1 + counts[s] * (kTotal - size_) / sum);
    frequency[most] += kTotal - used;
    uint32_t start = 0;
    for (int s = 0; s < size_; start += frequency[s++]) {
      below[s] = start;
      std::memset(symbols_.data() + context * kTotal + start, s, frequency[s]);
    }
    changed_[context] = false;
  }

  int64_t contexts_;
  int size_;
  std::vector<int64_t> counts_;
  std::vector<uint32_t> frequency_, below_;
  std::vector<uint8_t> symbols_;
  std::vector<bool> changed_;
};

// Decodes a plane into `out` [count]; returns where in `words` it ended, or -1 if they ended first. `near` [A]: the
// class of a neighbour with each symbol, times the number of given contexts; `given` [count] or empty.
int64_t pfz_plane(States states, Words words, int64_t at, Longs start, Longs near, int64_t contexts, Longs given,
                  int64_t steps, Longs out) {
  const int64_t count = out.shape(0), lanes = (count + steps - 1) / steps, end = words.shape(0);
  const int64_t *known = given.shape(0) ? given.data() : nullptr, *classes = near.data();
  const uint16_t *in = words.data();
  uint32_t *state = states.data();
  int64_t *to = out.data();
  nb::gil_scoped_release unlocked;
  Model model(start, contexts);
  const int64_t longest = std::max<int64_t>(1, kBlock / lanes);
  std::vector<int64_t> average(lanes, (static_cast<int64_t>(start.shape(0)) - 1) * 8), seen(lanes * longest);
  int64_t step = 0, length = 1;
  while (step < steps) {
    model.update();
    const int64_t stop = std::min(step + length, steps), first = step;
    for (; step < stop; step++) {
      const int64_t active = (count - step + steps - 1) / steps;
      for (int64_t lane = 0; lane < active; lane++) {
        const int64_t place = lane * steps + step;
        const int64_t context = classes[average[lane] >> 4] + (known ? known[place] : 0);
        uint32_t now = state[lane];
        const int symbol = model.take(context, now);
        if (now < kStateMin) {
          if (at >= end) return -1;
          now = now << 16 | in[at++];
        }
        state[lane] = now, to[place] = symbol;
        average[lane] = (average[lane] + symbol * 16) >> 1;
        seen[(step - first) * lanes + lane] = context;
      }
    }
    if (stop == steps) break;
    for (int64_t s = first; s < stop; s++) {
      const int64_t active = (count - s + steps - 1) / steps;
      for (int64_t lane = 0; lane < active; lane++)
        model.add(seen[(s - first) * lanes + lane], static_cast<int>(to[lane * steps + s]));
      for (int64_t lane = active; lane < lanes; lane++)
        model.add(0, 0);  // as the specification counts lanes that ended
    }
    length = std::min(std::max<int64_t>(step, 1), longest);
  }
  return at;
}

}  // namespace

void bind_pfz_decode(nb::module_ &m) { m.def("pfz_plane", &pfz_plane); }

}  // namespace pf
