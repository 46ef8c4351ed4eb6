// Small multilayer perceptrons: a block of rows goes through all layers while it is in the nearest cache.
//
// Everything is one matrix product, C[m][n ..] += A(m, k) * B[k][n ..], with vectors along n and A broadcast: forward
// (A rows, B transposed weights), to the inputs (A row gradients, B weights) and to the weights (A row gradients read
// down a column, B rows). Rows stay as tensors hold them; each layer's width is padded to whole vectors.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>
#include "arrays.h"
#include "bindings.h"
#include "parallel.h"
#include "simd.h"

namespace pf {
namespace {

constexpr int kBlock = 48;        // rows that pass the layers together
constexpr int64_t kChunk = 4096;  // rows whose weight gradients are added up before all chunks' are
#if defined(__AVX512F__)
constexpr int kSums = 24, kTileVectors = 4;  // of 32 registers
#else
constexpr int kSums = 10, kTileVectors = 2;  // of 16
#endif

constexpr int padded(int n) { return (n + W - 1) / W * W; }

// A(m, k) = a[m * a_row + k * a_column].
struct Product {
  const float *a;
  int64_t a_row, a_column;
  const float *b;
  int b_row;
  float *c;
  int c_row, depth;
  bool add;  // to what is in c
};

template <int Rows, int Vectors>
PF_INLINE void tile(const Product &p, int m, int n) {
  vf sums[Rows][Vectors];
  for (int i = 0; i < Rows; i++)
    for (int v = 0; v < Vectors; v++) sums[i][v] = p.add ? load(p.c + (m + i) * p.c_row + n + v * W) : vf{};
  const float *a = p.a + m * p.a_row, *b = p.b + n;
  for (int k = 0; k < p.depth; k++, a += p.a_column, b += p.b_row) {
    vf row[Vectors];
    for (int v = 0; v < Vectors; v++) row[v] = load(b + v * W);
    for (int i = 0; i < Rows; i++) {
      const vf factor = broadcast(a[i * p.a_row]);
      for (int v = 0; v < Vectors; v++) sums[i][v] += factor * row[v];
    }
  }
  for (int i = 0; i < Rows; i++)
    for (int v = 0; v < Vectors; v++) store(p.c + (m + i) * p.c_row + n + v * W, sums[i][v]);
}

// A tile of `rows` <= Rows rows.
template <int Rows, int Vectors>
void last_tile(const Product &p, int rows, int m, int n) {
  if constexpr (Rows > 0) {
    if (rows == Rows) tile<Rows, Vectors>(p, m, n);
    else last_tile<Rows - 1, Vectors>(p, rows, m, n);
  }
}

// Narrow columns take more rows at once: the sums of one tile hide each other's latency.
template <int Vectors>
void columns(const Product &p, int rows, int n) {
  constexpr int tile_rows = std::min(kSums / Vectors, 12);
  int m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) tile<tile_rows, Vectors>(p, m, n);
  last_tile<tile_rows - 1, Vectors>(p, rows - m, m, n);
}

// `width` is a multiple of W.
void multiply(const Product &p, int rows, int width) {
  int n = 0;
  for (; n + kTileVectors * W <= width; n += kTileVectors * W) columns<kTileVectors>(p, rows, n);
  if constexpr (kTileVectors > 2)
    for (; n + 2 * W <= width; n += 2 * W) columns<2>(p, rows, n);
  for (; n < width; n += W) columns<1>(p, rows, n);
}

enum class Head { none, relu, sigmoid, softplus };

Head head_of(const std::string &name) {
  if (name == "none") return Head::none;
  if (name == "relu") return Head::relu;
  if (name == "sigmoid") return Head::sigmoid;
  if (name == "softplus") return Head::softplus;
  throw nb::value_error("output: expected none, relu, sigmoid or softplus");
}

// In this order of its arguments, `max` keeps NaN.
PF_INLINE vf exp_minus_abs(vf x) { return exp2(max(broadcast(-125.f), abs(x) * -1.44269504f)); }
PF_INLINE vf sigmoid(vf x) {
  const vf e = exp_minus_abs(x);
  return select(lt(x, vf{}), e, broadcast(1.f)) / (1.f + e);
}
// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); the latter, of 0 .. 1, as 2 atanh(e / (2 + e)), which stays exact near 0.
PF_INLINE vf softplus(vf x) {
  const vf e = exp_minus_abs(x), s = e / (2.f + e), z = s * s;
  const vf series = ((((z * (2.f / 11) + 2.f / 9) * z + 2.f / 7) * z + 2.f / 5) * z + 2.f / 3) * z + 2.f;
  return max(vf{}, x) + s * series;
}

PF_INLINE vf activate(Head head, vf x) {
  switch (head) {
    case Head::relu:
      return max(vf{}, x);
    case Head::sigmoid:
      return sigmoid(x);
    case Head::softplus:
      return softplus(x);
    default:
      return x;
  }
}
// dL/dx from x and dL/d activate(x).
PF_INLINE vf activate_vjp(Head head, vf x, vf v) {
  switch (head) {
    case Head::relu:
      return keep(lt(vf{}, x), v);
    case Head::sigmoid: {
      const vf e = exp_minus_abs(x), inverse = 1.f / (1.f + e);
      return v * e * inverse * inverse;
    }
    case Head::softplus:
      return v * sigmoid(x);
    default:
      return v;
  }
}

// The layers' shapes, and the weights in the two forms that the products read.
struct Network {
  std::vector<int> dims;                           // inputs, hidden widths, outputs
  std::vector<std::vector<float>> forward, back;   // [in][padded out] and [out][padded in]
  std::vector<int64_t> starts;                     // of each layer's [out][in] in the flat weights
  Head head;

  int layers() const { return static_cast<int>(dims.size()) - 1; }
  int in() const { return dims.front(); }
  int out() const { return dims.back(); }
  // Rows of a block's activations behind layer `l`; 0 is the input.
  int stride(int l) const { return padded(dims[l]); }
};

Network make_network(Floats weights, const std::vector<int> &dims, const std::string &head) {
  Network net{dims, {}, {}, {}, head_of(head)};
  const float *w = weights.data();
  int64_t start = 0;
  for (int l = 0; l < net.layers(); l++) {
    const int in = dims[l], out = dims[l + 1];
    std::vector<float> forward(static_cast<size_t>(in) * padded(out), 0.f),
        back(static_cast<size_t>(out) * padded(in), 0.f);
    for (int j = 0; j < out; j++)
      for (int i = 0; i < in; i++)
        forward[i * padded(out) + j] = back[j * padded(in) + i] = w[start + static_cast<int64_t>(j) * in + i];
    net.starts.push_back(start);
    net.forward.push_back(std::move(forward)), net.back.push_back(std::move(back));
    start += static_cast<int64_t>(in) * out;
  }
  if (start != static_cast<int64_t>(weights.size())) throw nb::value_error("weights: their number does not fit dims");
  return net;
}

// One thread's room for a block.
struct Room {
  std::vector<Buffer<float>> values, gradients;  // of each layer, the input included
  explicit Room(const Network &net) : values(net.layers() + 1), gradients(net.layers() + 1) {
    for (int l = 0; l <= net.layers(); l++) {
      values[l].need(kBlock * net.stride(l));
      gradients[l].need(kBlock * net.stride(l));
    }
  }
};

// Rows of `width` floats to rows of `stride`, zeros between.
void widen(const float *from, int rows, int width, float *to, int stride) {
  for (int r = 0; r < rows; r++) {
    std::copy_n(from + static_cast<int64_t>(r) * width, width, to + r * stride);
    std::fill(to + r * stride + width, to + (r + 1) * stride, 0.f);
  }
}

// Values of all layers for `rows` rows; the last one's before its head. x is used where it lies if rows are whole
// vectors.
void forward_block(const Network &net, const float *x, int rows, Room &room) {
  for (int l = 0; l < net.layers(); l++) {
    const float *from = l == 0 ? x : room.values[l].data();
    float *to = room.values[l + 1].data();
    const int row = l == 0 ? net.in() : net.stride(l), width = net.stride(l + 1);
    multiply({from, row, 1, net.forward[l].data(), width, to, width, net.dims[l], false}, rows, width);
    if (l + 1 < net.layers())
      for (int i = 0; i < rows * width; i += W) store(to + i, max(vf{}, load(to + i)));
  }
}

void mlp_forward(Floats x, Floats weights, std::vector<int> dims, std::string head, Floats out) {
  const Network net = make_network(weights, dims, head);
  const float *in = x.data();
  float *result = out.data();
  const int64_t count = x.shape(0);
  nb::gil_scoped_release unlocked;
  parallel_for(count, kChunk, [&](int64_t begin, int64_t end) {
    Room room(net);
    const int last = net.layers(), stride = net.stride(last);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlock, end - first));
      forward_block(net, in + first * net.in(), rows, room);
      float *values = room.values[last].data();
      for (int i = 0; i < rows * stride; i += W) store(values + i, activate(net.head, load(values + i)));
      for (int r = 0; r < rows; r++) std::copy_n(values + r * stride, net.out(), result + (first + r) * net.out());
    }
  });
}

// v_x is not written if it is empty.
void mlp_backward(Floats x, Floats weights, std::vector<int> dims, std::string head, Floats v_out, Floats v_x,
                  Floats v_weights) {
  const Network net = make_network(weights, dims, head);
  const float *in = x.data(), *upstream = v_out.data();
  float *to_x = v_x.size() > 0 ? v_x.data() : nullptr, *to_weights = v_weights.data();
  const int64_t count = x.shape(0), chunks = (count + kChunk - 1) / kChunk;
  int64_t total = 0;  // floats of the padded weight gradients
  std::vector<int64_t> starts;
  for (int l = 0; l < net.layers(); l++)
    starts.push_back(total), total += static_cast<int64_t>(net.dims[l + 1]) * net.stride(l);
  std::vector<float> partial(chunks * total, 0.f);
  nb::gil_scoped_release unlocked;
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t stop) {
    Room room(net);
    for (; chunk < stop; chunk++) {
      float *sums = partial.data() + chunk * total;
      const int64_t end = std::min(count, (chunk + 1) * kChunk);
      for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
        const int rows = static_cast<int>(std::min<int64_t>(kBlock, end - first)), last = net.layers();
        const float *block = in + first * net.in();
        forward_block(net, block, rows, room);
        widen(upstream + first * net.out(), rows, net.out(), room.gradients[last].data(), net.stride(last));
        if (net.stride(0) != net.in()) {
          widen(block, rows, net.in(), room.values[0].data(), net.stride(0));
          block = room.values[0].data();
        }
        for (int l = last; l > 0; l--) {
          const int out = net.dims[l], out_row = net.stride(l), in_row = net.stride(l - 1);
          float *v = room.gradients[l].data(), *before = room.gradients[l - 1].data();
          const float *values = room.values[l].data(), *inputs = l == 1 ? block : room.values[l - 1].data();
          const Head act = l == last ? net.head : Head::relu;
          for (int i = 0; i < rows * out_row; i += W) store(v + i, activate_vjp(act, load(values + i), load(v + i)));
          multiply({v, 1, out_row, inputs, in_row, sums + starts[l - 1], in_row, rows, true}, out, in_row);
          if (l > 1 || to_x)
            multiply({v, out_row, 1, net.back[l - 1].data(), in_row, before, in_row, out, false}, rows, in_row);
        }
        if (to_x)
          for (int r = 0; r < rows; r++)
            std::copy_n(room.gradients[0].data() + r * net.stride(0), net.in(), to_x + (first + r) * net.in());
      }
    }
  });
  for (int l = 0; l < net.layers(); l++)
    for (int j = 0; j < net.dims[l + 1]; j++)
      for (int i = 0; i < net.dims[l]; i++) {
        float sum = 0.f;
        for (int64_t chunk = 0; chunk < chunks; chunk++)
          sum += partial[chunk * total + starts[l] + static_cast<int64_t>(j) * net.stride(l) + i];
        to_weights[net.starts[l] + static_cast<int64_t>(j) * net.dims[l] + i] = sum;
      }
}

}  // namespace

void bind_mlp(nb::module_ &m) {
  m.def("mlp_forward", &mlp_forward);
  m.def("mlp_backward", &mlp_backward);
}

}  // namespace pf
