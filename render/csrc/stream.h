// Writes that go past the caches, for results larger than these: a plain store first reads the line that it overwrites.
#pragma once
#include <cstdint>
#include <cstring>
#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pf {

constexpr int64_t kStreamFloats = 8 << 20;  // 32 MiB: what is smaller may still be in the cache when it is read

// Whether `count` floats at `to` should and can be written with `stream`.
inline bool stream_pays(int64_t count, const float *to) {
#if defined(__SSE2__)
  return count >= kStreamFloats && reinterpret_cast<uintptr_t>(to) % sizeof(vf) == 0;
#else
  (void)count, (void)to;
  return false;
#endif
}

// Copies `count` floats; `to` is aligned to a vector. Others see them after `stream_fence`.
inline void stream(float *to, const float *from, int64_t count) {
  int64_t i = 0;
#if defined(__SSE2__)
#if defined(__AVX512F__)
  for (; i + W <= count; i += W) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#elif defined(__AVX2__)
  for (; i + W <= count; i += W) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#else
  for (; i + W <= count; i += W) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
#endif
#endif
  std::memcpy(to + i, from + i, (count - i) * sizeof(float));
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace pf
