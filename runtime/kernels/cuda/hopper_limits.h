// What the Hopper kernel computes, how a CTA is cut, how its shared memory lies: for plan, launch and kernel.
#pragma once

#include <cstdint>

#include "layout.h"

namespace qcompile::cuda::hopper {

constexpr int kConsumers = 2;                          // warpgroups that multiply, a block of 64 columns each
constexpr int kThreads = 128 * (1 + kConsumers);       // and one that copies
constexpr int kColumns = kConsumers * kBlockN;         // Plan::block_n
constexpr int kTokenTiles[] = {64, 128, 256};          // Plan::tokens: the N of wgmma
constexpr int64_t kSharedLimit = 227 * 1024;           // of one block on sm_90
constexpr int kSwizzleBytes = 1024;                    // after which the 128-byte swizzle repeats: where tiles begin

// x comes prepared to fp16 or bf16, and scales are multiplied into the weights: fp32 scales would not fit fp16.
QCOMPILE_HD bool supports(const Layout& layout) { return layout.bits == 4 && layout.element != Element::kFloat; }

// ---- One stage: a tile of x (tokens, 64), then for each of the two blocks the codes of 64 k and the scales and zero
// points of the at most two groups that 64 k touch.
constexpr int kCodeBytes = kBlockN * kStepK / 2;
constexpr int kStepGroups = 2;
constexpr int kScaleBytes = kStepGroups * kBlockN * 2;
constexpr int kZeroBytes = kStepGroups * kBlockN / 2;
constexpr int kBlockBytes = kCodeBytes + kScaleBytes + kZeroBytes;

constexpr int tile_bytes(int tokens) { return tokens * kStepK * 2; }
constexpr int stage_bytes(int tokens) { return tile_bytes(tokens) + kConsumers * kBlockBytes; }

// Results leave through shared memory, 32 tokens at a time; rows are 16 bytes longer so that 8 lanes hit 8 banks.
constexpr int kChunkTokens = 32;
constexpr int kChunkRowBytes = kBlockN * 2 + 16;
constexpr int kChunkBytes = kChunkTokens * kChunkRowBytes;

constexpr int kBarriers = 2;   // of a stage: full and empty
constexpr int kFlagBytes = 8;  // tells the warpgroups which CTA of a split sum is last

// Sums over k may be split between CTAs (Plan::split): each takes ceil(steps / split) steps of 64 k, and the last one
// adds up. Plan::counters is then one for each tile of the grid, grid_n * grid_m, and partial sums take partials_bytes;
// they lie as the accumulators do, not as rows.
QCOMPILE_HD int64_t partials_bytes(const Layout& layout, int64_t grid_m, int tokens, int split) {
  return split > 1 ? grid_m * split * tokens * layout.padded_n * 4 : 0;
}

// Enough stages to hide the latency of memory (a step of 256 tokens takes some 1000 clocks, of 64 tokens 250), and no
// more than fit.
constexpr int stages(int tokens) { return tokens == 256 ? 5 : tokens == 128 ? 8 : 12; }

constexpr int64_t shared_bytes(int tokens) {
  const int64_t in_stages = int64_t(stages(tokens)) * (stage_bytes(tokens) + kBarriers * 8);
  return kSwizzleBytes + in_stages + kConsumers * kChunkBytes + kFlagBytes;  // the first term: to align
}

static_assert(shared_bytes(64) <= kSharedLimit && shared_bytes(128) <= kSharedLimit, "stages do not fit");
static_assert(shared_bytes(256) <= kSharedLimit, "stages do not fit");

}  // namespace qcompile::cuda::hopper
