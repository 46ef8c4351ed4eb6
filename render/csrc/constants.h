// The cutoffs of ops/constants.py, for the compiler. A test holds the two equal.
#pragma once

namespace pf {

constexpr float kAlphaMin = 1.f / 255.f, kAlphaMax = 0.99f, kTransMin = 1e-4f, kBlur = 0.3f, kViewMargin = 0.15f,
                kNear = 0.01f;
constexpr float kLog2e = 1.44269504f, kLogAlphaMin = -5.5412636f;  // ln(1/255)

}  // namespace pf
