// The convex hulls of K points in the plane, W at a time, without a branch.
#pragma once
#include "simd.h"

namespace pf {

// What `hull_order` of ops/project_convexes.py computes, and the corners themselves.
template <int K>
struct Hull {
  vf x[K], y[K];  // corners in order, then the first again
  vf from[K];     // which points they are
  vf corners;     // how many

  PF_INLINE Hull(const vf *points_x, const vf *points_y) {
    vf px[K], py[K], id[K];
    for (int k = 0; k < K; k++) px[k] = points_x[k], py[k] = points_y[k], id[k] = broadcast(k);
    sort(px, py, id);
    vm lower[K], upper[K];
    const vm always = le(vf{}, vf{});
    for (int k = 0; k < K; k++) lower[k] = upper[k] = always;
    for (int middle = 1; middle < K - 1; middle++)
      for (int left = 0; left < middle; left++)
        for (int right = middle + 1; right < K; right++) {
          const vf turn =
              (px[right] - px[left]) * (py[middle] - py[left]) - (py[right] - py[left]) * (px[middle] - px[left]);
          vm below = lt(turn, vf{}), above = lt(vf{}, turn);
          // Of points that coincide the first counts, but of those at the right end the last. Said of the end, too:
          // where products are fused, their difference is not 0.
          const vm same = both(equal(px[middle], px[right]), equal(py[middle], py[right]));
          if (right < K - 1) below = either(below, same), above = either(above, same);
          else below = but_not(below, same), above = but_not(above, same);
          lower[middle] = both(lower[middle], below), upper[middle] = both(upper[middle], above);
        }
    for (int k = 0; k < K; k++) x[k] = px[0], y[k] = py[0], from[k] = id[0];
    corners = broadcast(1.f);
    for (int k = 1; k < K; k++) place(lower[k], px[k], py[k], id[k]);
    for (int k = K - 2; k > 0; k--) place(upper[k], px[k], py[k], id[k]);
  }

 private:
  static PF_INLINE vm equal(vf a, vf b) { return both(le(a, b), le(b, a)); }

  static PF_INLINE void sort(vf *px, vf *py, vf *id) {
    for (int end = K - 1; end > 0; end--)
      for (int k = 0; k < end; k++) {
        const vm swapped = either(lt(px[k + 1], px[k]), both(equal(px[k], px[k + 1]), lt(py[k + 1], py[k])));
        exchange(swapped, px[k], px[k + 1]), exchange(swapped, py[k], py[k + 1]), exchange(swapped, id[k], id[k + 1]);
      }
  }
  static PF_INLINE void exchange(vm swapped, vf &a, vf &b) {
    const vf first = select(swapped, b, a);
    b = select(swapped, a, b), a = first;
  }

  PF_INLINE void place(vm is_corner, vf px, vf py, vf id) {
    for (int slot = 1; slot < K; slot++) {
      const vm here = both(is_corner, equal(corners, broadcast(slot)));
      x[slot] = select(here, px, x[slot]), y[slot] = select(here, py, y[slot]),
      from[slot] = select(here, id, from[slot]);
    }
    corners += keep(is_corner, broadcast(1.f));
  }
};

}  // namespace pf
