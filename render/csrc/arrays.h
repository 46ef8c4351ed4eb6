// The array types that cross the border to Python, and memory that stays with a thread from call to call.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <cstdint>
#include <cstdlib>
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
  ~Buffer() { std::free(data_); }
  T *need(size_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = count + count / 8;
      data_ = static_cast<T *>(std::aligned_alloc(64, (capacity_ * sizeof(T) + 63) / 64 * 64));
      if (!data_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  T &operator[](size_t i) { return data_[i]; }
  T *data() { return data_; }

 private:
  T *data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace pf
