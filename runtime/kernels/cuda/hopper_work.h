// What a CTA of the Hopper kernel is given, which part of the product it computes, where its shared memory is what.
#pragma once

#include <cstdint>

#include "device_sm90.h"
#include "hopper_limits.h"
#include "product.h"

namespace qcompile::cuda::hopper {

// The grid is (pairs of blocks, split, tiles of rows). Beside it stands the tensor map: x (m, padded_k), in boxes of
// (kTokens, 64), swizzled.
struct Arguments {
  Layout layout;
  const uint8_t *codes, *scales, *zeros;  // as in layout.h
  const uint16_t* bias;                   // (n,) or nullptr
  uint16_t* y;                            // (m, n)
  int64_t m;
  float* partials;                        // as hopper_limits.h says, where split > 1
  uint32_t* counters;                     // (tiles of rows, pairs of blocks), zeros before and behind
};

inline Arguments arguments_of(const Product& p) {
  return {p.layout, static_cast<const uint8_t*>(p.codes), static_cast<const uint8_t*>(p.scales),
          static_cast<const uint8_t*>(p.zeros), static_cast<const uint16_t*>(p.bias), static_cast<uint16_t*>(p.y),
          p.m, p.partials, p.counters};
}

// What this CTA computes: blocks [first_block, first_block + blocks), rows [first_m, first_m + kTokens), of these sums
// steps [begin, end).
struct Work {
  int64_t first_block, first_m, begin, end;
  int blocks;  // 1 or 2
};

QCOMPILE_DEVICE Work work_of_block(const Layout& layout, int tokens) {
  const int64_t first_block = int64_t(block_x()) * kConsumers, steps = layout.steps();
  const int64_t share = (steps + grid_y() - 1) / grid_y(), begin = share * block_y();
  const int64_t end = begin + share < steps ? begin + share : steps;
  return {first_block, int64_t(block_z()) * tokens, begin, end, first_block + 1 < layout.blocks() ? 2 : 1};
}

// Addresses in shared memory: tiles of x first, each where the swizzle begins; then blocks, chunks, barriers.
template <int kTokens>
struct Shared {
  static constexpr int kStages = stages(kTokens);
  uint32_t base;

  QCOMPILE_DEVICE uint32_t tile(int stage) const { return base + uint32_t(stage * tile_bytes(kTokens)); }
  QCOMPILE_DEVICE uint32_t block(int stage, int consumer) const {
    return tile(kStages) + uint32_t((stage * kConsumers + consumer) * kBlockBytes);
  }
  QCOMPILE_DEVICE uint32_t chunk(int consumer) const { return block(kStages, 0) + uint32_t(consumer * kChunkBytes); }
  QCOMPILE_DEVICE uint32_t full(int stage) const { return chunk(kConsumers) + uint32_t(stage * 8); }
  QCOMPILE_DEVICE uint32_t empty(int stage) const { return full(kStages + stage); }
  QCOMPILE_DEVICE uint32_t flag() const { return empty(kStages); }
};

// A place in the ring of stages. The phase of a stage's barriers is counted by rounds.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t round = 0;
  QCOMPILE_DEVICE void advance() {
    if (++stage == kStages) stage = 0, ++round;
  }
};

}  // namespace qcompile::cuda::hopper
