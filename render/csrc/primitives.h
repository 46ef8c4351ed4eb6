// The primitives that the tile rasterizer draws. Each is a struct with what `Gaussian` has; ops/primitives.py says what
// they compute.
#pragma once
#include <stdexcept>
#include <string>
#include "convex.h"
#include "gaussian.h"

namespace pf {

// Calls visit(Primitive type) for the primitive called `name`. Python may know more of them, which only the reference
// draws.
template <class Visit>
void with_primitive(const std::string &name, Visit visit) {
  if (name == "convex6") visit.template operator()<Convex<6>>();
  else if (name == "convex12") visit.template operator()<Convex<12>>();
  else if (name == "gaussian") visit.template operator()<Gaussian>();
  else
    throw std::invalid_argument("primitive \"" + name +
                                "\" has no C++ kernels; csrc/primitives.h lists those that have");
}

}  // namespace pf
