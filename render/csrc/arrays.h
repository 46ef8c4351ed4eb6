// The array types that cross the border to Python, and memory that stays with a thread from call to call.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <cstdint>
#include <new>

namespace pf {

namespace nb = nanobind;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::c_contig, nb::device::cpu>;
using Bools = nb::ndarray<bool, nb::c_contig, nb::device::cpu>;

// Uninitialised, 64-byte aligned, grows only.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { release(); }
  T *need(size_t count) {
    if (count > capacity_) {
      release();
      const size_t capacity = count + count / 8;  // rounded up to whole cache lines
      data_ = static_cast<T *>(::operator new((capacity * sizeof(T) + 63) / 64 * 64, kAlignment));
      capacity_ = capacity;
    }
    return data_;
  }
  T &operator[](size_t i) { return data_[i]; }
  T *data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};  // not std::aligned_alloc, which Windows lacks
  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr, capacity_ = 0;
  }
  T *data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace pf
