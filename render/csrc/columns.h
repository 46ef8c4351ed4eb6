// Between rows of a few floats, as tensors hold them, and vectors of W rows' first, second, ... floats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include "simd.h"

namespace pf {

using Lanes = std::make_integer_sequence<int, W>;

// Lanes of a column from `vectors` (the rows one after the other): those that lie in vector `Source`, on top of
// `so_far`.
template <int Width, int Column, int Source, int... Lane>
PF_INLINE vf add_to_column(vf so_far, const vf *vectors, std::integer_sequence<int, Lane...>) {
  return PF_SHUFFLE(so_far, vectors[Source],
                    (Width * Lane + Column) / W == Source ? W + (Width * Lane + Column) % W : Lane);
}
template <int Width, int Column, int... Source>
PF_INLINE vf gather_column(const vf *vectors, std::integer_sequence<int, Source...>) {
  vf column = vectors[0];
  ((column = add_to_column<Width, Column, Source>(column, vectors, Lanes{})), ...);
  return column;
}

// Lanes of vector `Vector` of the rows one after the other: those that come from column `Source`, on top of `so_far`.
template <int Width, int Vector, int Source, int... Lane>
PF_INLINE vf add_to_rows(vf so_far, const vf *columns, std::integer_sequence<int, Lane...>) {
  return PF_SHUFFLE(so_far, columns[Source],
                    (Vector * W + Lane) % Width == Source ? W + (Vector * W + Lane) / Width : Lane);
}
template <int Width, int Vector, int... Source>
PF_INLINE vf gather_rows(const vf *columns, std::integer_sequence<int, Source...>) {
  vf rows = columns[0];
  ((rows = add_to_rows<Width, Vector, Source>(rows, columns, Lanes{})), ...);
  return rows;
}

template <int Width, int... Index>
PF_INLINE void load_columns(const float *p, int rows, vf *columns, std::integer_sequence<int, Index...> each) {
  const int floats = rows * Width;
  const vf vectors[Width] = {load_some(p + Index * W, std::clamp(floats - Index * W, 0, W))...};
  ((columns[Index] = gather_column<Width, Index>(vectors, each)), ...);
}
// The columns of at most W rows of `Width` floats at p; 0 in the lanes beyond the rows.
template <int Width>
PF_INLINE void load_columns(const float *p, int rows, vf *columns) {
  load_columns<Width>(p, rows, columns, std::make_integer_sequence<int, Width>{});
}

template <int Width, int... Index>
PF_INLINE void store_columns(float *p, int rows, const vf *columns, std::integer_sequence<int, Index...> each) {
  const int floats = rows * Width;
  (store_some(p + Index * W, gather_rows<Width, Index>(columns, each), std::clamp(floats - Index * W, 0, W)), ...);
}
// The counterpart of `load_columns`.
template <int Width>
PF_INLINE void store_columns(float *p, int rows, const vf *columns) {
  store_columns<Width>(p, rows, columns, std::make_integer_sequence<int, Width>{});
}

}  // namespace pf
