// Vectors of W floats. GCC/Clang vector extensions give the arithmetic; what they lack (masks that stay masks,
// reciprocals, horizontal sums) is spelled per instruction set. Scalar overloads let one template serve a pixel or a
// block.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PF_INLINE inline __attribute__((always_inline))
// Lanes of the vectors a (0 .. W - 1) and b (W .. 2 W - 1); `lane` is an expression of the parameter pack Lane.
#if defined(__clang__)
#define PF_SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, (lane)...)
#else
#define PF_SHUFFLE(a, b, lane) __builtin_shuffle(a, b, vi{(lane)...})
#endif

namespace pf {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

PF_INLINE vf broadcast(float x) { return vf{} + x; }
PF_INLINE vf load(const float *p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PF_INLINE void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
typedef __mmask16 vm;
PF_INLINE vm le(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ); }
PF_INLINE vm lt(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
PF_INLINE vm lt(vi a, vi b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
PF_INLINE vm both(vm a, vm b) { return a & b; }
PF_INLINE vm but_not(vm a, vm b) { return a & ~b; }
PF_INLINE vm either(vm a, vm b) { return a | b; }
PF_INLINE bool any(vm m) { return m != 0; }
PF_INLINE vf select(vm m, vf a, vf b) { return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
PF_INLINE vi select(vm m, vi a, vi b) { return (vi)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
PF_INLINE vf keep(vm m, vf a) { return (vf)_mm512_maskz_mov_ps(m, (__m512)a); }
PF_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
PF_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
PF_INLINE vf abs(vf a) { return (vf)_mm512_abs_ps((__m512)a); }
PF_INLINE vf sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
PF_INLINE vf reciprocal(vf a) {  // 14 bits, then one Newton step
  const vf r = (vf)_mm512_rcp14_ps((__m512)a);
  return r * (2.f - a * r);
}
PF_INLINE vi truncate(vf a) { return (vi)_mm512_cvttps_epi32((__m512)a); }
#elif defined(__AVX2__)
typedef __m256 vm;
PF_INLINE vm le(vf a, vf b) { return _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ); }
PF_INLINE vm lt(vf a, vf b) { return _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ); }
PF_INLINE vm lt(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32((__m256i)b, (__m256i)a)); }
PF_INLINE vm both(vm a, vm b) { return _mm256_and_ps(a, b); }
PF_INLINE vm but_not(vm a, vm b) { return _mm256_andnot_ps(b, a); }
PF_INLINE vm either(vm a, vm b) { return _mm256_or_ps(a, b); }
PF_INLINE bool any(vm m) { return _mm256_movemask_ps(m) != 0; }
PF_INLINE vf select(vm m, vf a, vf b) { return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, m); }
PF_INLINE vi select(vm m, vi a, vi b) { return (vi)_mm256_castps_si256(_mm256_blendv_ps((__m256)b, (__m256)a, m)); }
PF_INLINE vf keep(vm m, vf a) { return (vf)_mm256_and_ps((__m256)a, m); }
PF_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
PF_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
PF_INLINE vf abs(vf a) { return (vf)_mm256_andnot_ps(_mm256_set1_ps(-0.f), (__m256)a); }
PF_INLINE vf sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
PF_INLINE vf reciprocal(vf a) {  // 12 bits, then one Newton step
  const vf r = (vf)_mm256_rcp_ps((__m256)a);
  return r * (2.f - a * r);
}
PF_INLINE vi truncate(vf a) { return (vi)_mm256_cvttps_epi32((__m256)a); }
#else
typedef vi vm;
PF_INLINE vm le(vf a, vf b) { return a <= b; }
PF_INLINE vm lt(vf a, vf b) { return a < b; }
PF_INLINE vm lt(vi a, vi b) { return a < b; }
PF_INLINE vm both(vm a, vm b) { return a & b; }
PF_INLINE vm but_not(vm a, vm b) { return a & ~b; }
PF_INLINE vm either(vm a, vm b) { return a | b; }
PF_INLINE bool any(vm m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
PF_INLINE vf select(vm m, vf a, vf b) { return (vf)(((vi)a & m) | ((vi)b & ~m)); }
PF_INLINE vi select(vm m, vi a, vi b) { return (a & m) | (b & ~m); }
PF_INLINE vf keep(vm m, vf a) { return (vf)((vi)a & m); }
PF_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
PF_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
PF_INLINE vf abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
PF_INLINE vf sqrt(vf a) {
  vf r;
  for (int lane = 0; lane < W; lane++) r[lane] = std::sqrt(a[lane]);
  return r;
}
PF_INLINE vf reciprocal(vf a) { return 1.f / a; }
PF_INLINE vi truncate(vf a) { return __builtin_convertvector(a, vi); }
#endif

// The first `count` floats at p, zeros behind; and their counterpart.
#if defined(__AVX2__) && !defined(__AVX512F__)
PF_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif
PF_INLINE vf load_some(const float *p, int count) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
#elif defined(__AVX2__)
  return (vf)_mm256_maskload_ps(p, first_lanes(count));
#else
  if (count == W) return load(p);
  float lanes[W];
  for (int i = 0; i < W; i++) lanes[i] = i < count ? p[i] : 0.f;
  return load(lanes);
#endif
}
PF_INLINE void store_some(float *p, vf v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#else
  if (count == W) return store(p, v);
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < count; i++) p[i] = lanes[i];
#endif
}

// The lanes of a mask, one bit each.
PF_INLINE uint32_t lane_bits(vm m) {
#if defined(__AVX512F__)
  return m;
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(m));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < W; lane++) bits |= static_cast<uint32_t>(m[lane] != 0) << lane;
  return bits;
#endif
}

// Swaps the off-diagonal blocks of Half lanes in each pair of vectors that lie Half apart.
template <int Half, int... Lane>
PF_INLINE void swap_blocks(vf *rows, std::integer_sequence<int, Lane...>) {
  for (int i = 0; i < W; i++) {
    if (i & Half) continue;
    const vf a = rows[i], b = rows[i + Half];
    rows[i] = PF_SHUFFLE(a, b, Lane & Half ? W + Lane - Half : Lane);
    rows[i + Half] = PF_SHUFFLE(a, b, Lane & Half ? W + Lane : Lane + Half);
  }
}

// A square of W vectors, in place.
PF_INLINE void transpose(vf *rows) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  if constexpr (W > 8) swap_blocks<8>(rows, lanes);
  if constexpr (W > 4) swap_blocks<4>(rows, lanes);
  swap_blocks<2>(rows, lanes);
  swap_blocks<1>(rows, lanes);
}

PF_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
PF_INLINE vm ge(vf a, vf b) { return le(b, a); }
PF_INLINE vm gt(vf a, vf b) { return lt(b, a); }

// 2^x for -126 <= x <= 0: degree-5 minimax polynomial over one unit, relative error 2e-7. AVX-512 takes any x. Without
// it the error is up to 6e-4 for x above 0, and below -126 the result is garbage.
PF_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = f * 0.001877577f + 0.008989340f;
  p = p * f + 0.055826317f;
  p = p * f + 0.240153617f;
  p = p * f + 0.693153073f;
  p = p * f + 0.999999925f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const vi whole = truncate(x);
  const vf f = x - to_float(whole);
  vf p = f * 0.0009449f + 0.0092058f;
  p = p * f + 0.05529736f;
  p = p * f + 0.24018014f;
  p = p * f + 0.69314372f;
  p = p * f + 1.0f;
  return (vf)((vi)p + (whole << 23));
#endif
}

// Natural logarithm of normal positive x, relative error 3e-7 away from 1 (absolute near it).
PF_INLINE vf log(vf x) {
  const vi bits = (vi)x;
  vi exponent = ((bits - 0x3f3504f3) >> 23);              // mantissa into [sqrt(1/2), sqrt(2))
  const vf m = (vf)(bits - (exponent << 23)) - 1.f;
  const vf s = m / (m + 2.f), z = s * s;                  // log(1+m) = 2 atanh(m / (m + 2))
  const vf series = ((0.22222222f * z + 0.28571429f) * z + 0.4f) * z + 0.66666667f;
  return to_float(exponent) * 0.69314718f + (s * series * z + 2.f * s);
}

PF_INLINE float sum(vf a) {
  float lanes[W], total = 0.f;
  store(lanes, a);
  for (int step = W / 2; step; step /= 2)
    for (int lane = 0; lane < step; lane++) lanes[lane] += lanes[lane + step];
  total = lanes[0];
  return total;
}

#if defined(__AVX2__)
PF_INLINE __m256 fold8(vf a) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a;
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
#else
  return (__m256)a;
#endif
}
// Horizontal sums of eight vectors at once, by a transposing tree.
PF_INLINE void sum8(const vf *v, float *out) {
  const __m256 ab = _mm256_hadd_ps(fold8(v[0]), fold8(v[1])), cd = _mm256_hadd_ps(fold8(v[2]), fold8(v[3]));
  const __m256 ef = _mm256_hadd_ps(fold8(v[4]), fold8(v[5])), gh = _mm256_hadd_ps(fold8(v[6]), fold8(v[7]));
  const __m256 q = _mm256_hadd_ps(ab, cd), r = _mm256_hadd_ps(ef, gh);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(q, r, 0x20), _mm256_permute2f128_ps(q, r, 0x31)));
}
PF_INLINE void sum4(const vf *v, float *out) {
  const __m256 q = _mm256_hadd_ps(_mm256_hadd_ps(fold8(v[0]), fold8(v[1])), _mm256_hadd_ps(fold8(v[2]), fold8(v[3])));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1)));
}
#else
PF_INLINE void sum4(const vf *v, float *out) {
  for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
}
PF_INLINE void sum8(const vf *v, float *out) {
  sum4(v, out);
  sum4(v + 4, out + 4);
}
#endif

// Horizontal sums of `Count` vectors; writes a multiple of four floats.
template <int Count>
PF_INLINE void sums(const vf *v, float *out) {
  constexpr int eights = Count / 8, rest = Count % 8;
  for (int i = 0; i < eights; i++) sum8(v + 8 * i, out + 8 * i);
  if constexpr (rest != 0) {
    vf tail[8] = {};
    for (int i = 0; i < rest; i++) tail[i] = v[8 * eights + i];
    if constexpr (rest > 4) sum8(tail, out + 8 * eights);
    else sum4(tail, out + 8 * eights);
  }
}

// The same names for one float, so that templates over the number type read alike.
PF_INLINE float min(float a, float b) { return a < b ? a : b; }
PF_INLINE float max(float a, float b) { return a > b ? a : b; }
PF_INLINE float select(bool m, float a, float b) { return m ? a : b; }
PF_INLINE float sqrt(float a) { return std::sqrt(a); }
PF_INLINE bool le(float a, float b) { return a <= b; }
PF_INLINE bool lt(float a, float b) { return a < b; }

}  // namespace pf
