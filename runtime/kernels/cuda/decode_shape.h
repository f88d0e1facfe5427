// The shape of the decode kernel (decode.h) and the shared memory that it takes: plain arithmetic, for plans too.
#pragma once

#include "layout.h"

namespace qcompile::cuda {

constexpr int kUnitSteps = 4;                     // steps of 64 k in a unit of the pipeline, one for each warp of a sum
constexpr int kUnitK = kUnitSteps * kStepK;
constexpr int kUnitGroups = kUnitK / 32;          // groups that a unit touches at most: group 32
constexpr int kRowStride = (kUnitK + 8) * 2;      // bytes; 16 more than a row of x: ldmatrix meets no bank twice
constexpr int kMinStages = 2, kMaxStages = 4;     // of the pipeline; given at the launch

// `tokens` of a CTA: 8, 16, 32 or 64. From 32 on two blocks of columns share the rows of x.
constexpr int decode_blocks(int tokens) { return tokens >= 32 ? 2 : 1; }
constexpr int decode_threads(int tokens) { return kUnitSteps * kLanes * decode_blocks(tokens); }

// Bytes of the parts of a stage: codes, rows of x, scales, zero points.
constexpr int stage_codes(int bits, int tokens) { return decode_blocks(tokens) * kUnitSteps * 512 * bits; }
constexpr int stage_rows(int tokens) { return tokens * kRowStride; }
constexpr int stage_scales(Element element, int tokens) {
  return decode_blocks(tokens) * kUnitGroups * kBlockN * (element == Element::kFloat ? 4 : 2);
}
constexpr int stage_zeros(int bits, int tokens) { return decode_blocks(tokens) * kUnitGroups * kBlockN * bits / 8; }

constexpr int stage_bytes(Element element, int bits, int tokens) {
  return stage_codes(bits, tokens) + stage_rows(tokens) + stage_scales(element, tokens) + stage_zeros(bits, tokens);
}

// Dynamic shared memory of a CTA. The epilogue needs less than one stage.
constexpr int decode_shared_bytes(Element element, int bits, int tokens, int stages) {
  return stages * stage_bytes(element, bits, tokens);
}

}  // namespace qcompile::cuda
