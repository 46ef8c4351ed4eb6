// Large arrays that are read at random, on large pages: the processor remembers where far fewer small ones lie.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pf {

// Asks for large pages under `bytes` at `start`, now if that can be; a wish, nothing fails without. Asked once for an
// array: the eight last ones are remembered. Not from several threads at a time.
inline void want_large_pages(const void *start, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  constexpr int collapse = 25;  // MADV_COLLAPSE of Linux 6.1
  static uintptr_t asked[8][2] = {};
  static int oldest = 0;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  if (end <= begin) return;
  for (const auto &range : asked)
    if (range[0] == begin && range[1] == end) return;
  asked[oldest][0] = begin, asked[oldest][1] = end, oldest = (oldest + 1) % 8;
  if (madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE) == 0)
    madvise(reinterpret_cast<void *>(begin), end - begin, collapse);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace pf
