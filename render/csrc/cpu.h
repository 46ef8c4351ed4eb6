// Which x86-64 feature level this processor and its operating system support.
#pragma once
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

namespace pf {

#if defined(__x86_64__) || defined(_M_X64)
// Registers whose state the operating system saves, as the bits of XCR0. Only where CPUID reports OSXSAVE.
inline unsigned saved_registers() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// 4, 3, 2 or 1, as the x86-64 psABI defines them. A processor may have AVX that the system does not save: then it is no
// level 3.
inline int cpu_level() {
  const auto all = [](unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; };
  unsigned a, b, c, d;
  unsigned basic = 0, extended = 0, features = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) basic = c;
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) features = b;

  const unsigned sse3 = 1u << 0, ssse3 = 1u << 9, cx16 = 1u << 13, sse41 = 1u << 19, sse42 = 1u << 20,
                 popcnt = 1u << 23;
  if (!all(basic, sse3 | ssse3 | cx16 | sse41 | sse42 | popcnt) || !all(extended, 1u << 0 /* lahf */)) return 1;

  const unsigned fma = 1u << 12, movbe = 1u << 22, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const unsigned bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
  if (!all(basic, fma | movbe | osxsave | avx | f16c) || !all(extended, 1u << 5 /* lzcnt */) ||
      !all(features, bmi1 | avx2 | bmi2) || !all(saved_registers(), 0x06 /* xmm, ymm */))
    return 2;

  const unsigned avx512f = 1u << 16, avx512dq = 1u << 17, avx512cd = 1u << 28, avx512bw = 1u << 30, avx512vl = 1u << 31;
  if (!all(features, avx512f | avx512dq | avx512cd | avx512bw | avx512vl)) return 3;
#if defined(__APPLE__)
  return 4;  // saves the upper registers from their first use on, and does not show them in XCR0 before
#else
  return all(saved_registers(), 0xe6 /* and opmask, zmm */) ? 4 : 3;
#endif
}
#else
inline int cpu_level() { return 0; }
#endif

}  // namespace pf
