// The primitives that the tile rasterizer draws. Each is a struct with what `Gaussian` has; ops/primitives.py says what
// they compute.
#pragma once
#include <string>
#include "convex.h"
#include "gaussian.h"

namespace pf {

// Calls visit(Primitive type) for the primitive called `name`; Python has already checked that it is one of these.
template <class Visit>
void with_primitive(const std::string &name, Visit visit) {
  if (name == "convex6") visit.template operator()<Convex<6>>();
  else if (name == "convex12") visit.template operator()<Convex<12>>();
  else visit.template operator()<Gaussian>();
}

}  // namespace pf
