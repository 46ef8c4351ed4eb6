// How an image is cut: square tiles, each a grid of blocks of W pixels, so that a block is one vector and a tile one bit mask.
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
    // First and last pixel column whose centre lies inside, clamped to the tile (and to one beyond where there is none).
    const vf lo = min(max(span.left - (tile_x - 0.4999f), broadcast(0.f)), broadcast(kTileSize));
    const vf hi = min(max(span.right - (tile_x - 0.5001f), broadcast(0.f)), broadcast(kTileSize));
    const vi begin = truncate(lo), end = truncate(hi);  // columns begin .. end - 1
    const vi one = vi{} + 1;
    const vi bits = (one << ((end + (kBlockWidth - 1)) >> kBlockWidthLog2)) - (one << (begin >> kBlockWidthLog2));
    const vi covered = bits & (begin < end);
    alignas(64) int32_t rows[W];
    std::memcpy(rows, &covered, sizeof rows);
    for (int lane = 0; lane < rows_at_once; lane++)
      blocks |= static_cast<uint64_t>(static_cast<uint32_t>(rows[lane])) << ((first + lane) * kBlocksX);
  }
  return blocks;
}

}  // namespace pf
