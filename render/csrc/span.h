// What a footprint says of the rows between two heights.
#pragma once

namespace pf {

// Leftmost and rightmost x reached; left > right if none is.
template <class T>
struct Span {
  T left, right;
};

}  // namespace pf
