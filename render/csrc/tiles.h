// How an image is cut: square tiles, each a grid of blocks of W pixels, so that a block is one vector and a tile one
// bit mask.
#pragma once
#include <bit>
#include <cstdint>
#include "simd.h"

namespace pf {

constexpr int kBlockWidth = 4, kBlockWidthLog2 = 2, kBlockHeight = W / kBlockWidth;
constexpr int kTileSize = W == 16 ? 32 : 16;
constexpr int kBlocksX = kTileSize / kBlockWidth, kBlocksY = kTileSize / kBlockHeight, kBlocks = kBlocksX * kBlocksY;
constexpr int kTilePixels = kTileSize * kTileSize;
static_assert(kBlocks <= 64);

// Pixel centres of each block, from the tile's corner.
struct BlockGrid {
  vf x[kBlocks], y[kBlocks];
  BlockGrid() {
    for (int block = 0; block < kBlocks; block++)
      for (int lane = 0; lane < W; lane++) {
        x[block][lane] = block % kBlocksX * kBlockWidth + lane % kBlockWidth + 0.5f;
        y[block][lane] = block / kBlocksX * kBlockHeight + lane / kBlockWidth + 0.5f;
      }
  }
};
inline const BlockGrid kGrid;

inline int column_in_tile(int block, int lane) { return block % kBlocksX * kBlockWidth + lane % kBlockWidth; }
inline int row_in_tile(int block, int lane) { return block / kBlocksX * kBlockHeight + lane / kBlockWidth; }

// The low kBlocksX bits of each lane, one after the other.
PF_INLINE uint64_t pack_rows(vi rows) {
#if defined(__AVX512F__)
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_cvtepi32_epi8((__m512i)rows)));
#elif defined(__AVX2__)
  const __m256i nibbles = _mm256_mullo_epi32(
      (__m256i)rows, _mm256_setr_epi32(1, 1 << 4, 1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28));
  const __m128i half = _mm_or_si128(_mm256_castsi256_si128(nibbles), _mm256_extracti128_si256(nibbles, 1));
  const __m128i quarter = _mm_or_si128(half, _mm_srli_si128(half, 8));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(quarter) | _mm_extract_epi32(quarter, 1));
#else
  uint64_t packed = 0;
  for (int lane = 0; lane < W; lane++)
    packed |= static_cast<uint64_t>(static_cast<uint32_t>(rows[lane])) << (lane * kBlocksX);
  return packed;
#endif
}

// The blocks of the tile at (tile_x, tile_y) that an outline reaches, one bit each, row by row.
template <class Outline>
PF_INLINE uint64_t covered_blocks(const Outline &outline, float tile_x, float tile_y) {
  uint64_t blocks = 0;
  constexpr int rows_at_once = W < kBlocksY ? W : kBlocksY;
  for (int first = 0; first < kBlocksY; first += rows_at_once) {
    vf y0;
    for (int lane = 0; lane < W; lane++) y0[lane] = (first + lane) * kBlockHeight + 0.5f;
    y0 += tile_y;
    const Span<vf> span = outline.row_span(y0, y0 + (kBlockHeight - 1.f));
    // First and last pixel column whose centre lies inside, clamped to the tile (and to one beyond where there is
    // none).
    const vf lo = min(max(span.left - (tile_x - 0.4999f), broadcast(0.f)), broadcast(kTileSize));
    const vf hi = min(max(span.right - (tile_x - 0.5001f), broadcast(0.f)), broadcast(kTileSize));
    const vi begin = truncate(lo), end = truncate(hi);  // columns begin .. end - 1
    const vi one = vi{} + 1;
    const vi bits = (one << ((end + (kBlockWidth - 1)) >> kBlockWidthLog2)) - (one << (begin >> kBlockWidthLog2));
    blocks |= pack_rows(bits & (begin < end)) << (first * kBlocksX);
  }
  return blocks;
}

}  // namespace pf
