// The decode kernel: products of few tokens, bound by reading the weight once. sm_80 and later; unverified on GPU.
//
// Yᵀ = Wᵀ Xᵀ on tensor cores (mma.m16n8k16). A CTA computes 64 or 128 columns for 8, 16, 32 or 64 tokens, over the
// units of 256 k that are its share of the sum. Unit after unit comes to shared memory by asynchronous copies,
// `stages` deep: codes, rows of x, scales and zero points. Warp (wn, wk) multiplies step wk of every unit for its block of 64 columns;
// what the four warps of a block have is summed at the end, and so are the shares of CTAs, always in the same order.
// Codes become n - z exactly (dequant.h); sums of a group are multiplied by its scale in fp32.
#pragma once

#include "decode_shape.h"
#include "dequant.h"
#include "plan.h"
#include "product.h"

namespace qcompile::cuda {

// Pointers as in launch.h's Product; strides and counts as the kernel needs them.
struct DecodeArguments {
  const uint8_t *codes, *scales, *zeros;
  const uint16_t* x;       // (m, padded_k), rows x_stride elements apart
  int64_t x_stride;
  void* y;                 // (m, n)
  const void* bias;        // (n,), or nullptr
  const float* row_factor; // (m,), or nullptr
  float* partials;         // (split, rows of all CTAs, padded_n)
  uint32_t* counters;      // one for each (n, m) tile
  int m, n, padded_n;
  int blocks, steps, units, units_of_a_cta;
  int groups, group_halves;  // of a column; 32 k in a group
  uint64_t group_inverse;    // 2^32 / group_halves, rounded up
  int stages;
};

// All but the pointers. Exact for K up to 2^21, see group_of.
inline DecodeArguments decode_arguments(const Layout& layout, int64_t m, int split, int stages) {
  DecodeArguments a = {};
  a.x_stride = layout.padded_k;
  a.m = int(m);
  a.n = int(layout.n);
  a.padded_n = int(layout.padded_n);
  a.blocks = int(layout.blocks());
  a.steps = int(layout.steps());
  a.units = (a.steps + kUnitSteps - 1) / kUnitSteps;
  a.units_of_a_cta = (a.units + split - 1) / split;
  a.groups = int(layout.groups());
  a.group_halves = int(layout.group / 32);
  a.group_inverse = ((uint64_t(1) << 32) + uint64_t(a.group_halves) - 1) / uint64_t(a.group_halves);
  a.stages = stages;
  return a;
}

// What a launch hands to the kernel.
inline DecodeArguments decode_arguments(const Plan& plan, const Product& p) {
  DecodeArguments a = decode_arguments(p.layout, p.m, plan.split, plan.stages);
  a.codes = static_cast<const uint8_t*>(p.codes);
  a.scales = static_cast<const uint8_t*>(p.scales);
  a.zeros = static_cast<const uint8_t*>(p.zeros);
  a.x = static_cast<const uint16_t*>(p.x);
  a.x_stride = p.x_stride;
  a.y = p.y;
  a.bias = p.bias;
  a.row_factor = p.row_factor;
  a.partials = p.partials;
  a.counters = p.counters;
  return a;
}

template <Element element, int bits, int MT>
struct Decode {
  static constexpr bool kBfloat = element == Element::kBfloat16;
  static constexpr int kTokens = 8 * MT;
  static constexpr int kBlocks = decode_blocks(kTokens);     // warps along n
  static constexpr int kThreads = decode_threads(kTokens);
  static constexpr int kBlockThreads = kUnitSteps * kLanes;
  static constexpr int kScaleBytes = element == Element::kFloat ? 4 : 2;
  static constexpr int kGroupScales = kBlockN * kScaleBytes;  // bytes of a group of a block
  static constexpr int kGroupZeros = kBlockN * bits / 8;
  static constexpr int kStepBytes = 512 * bits;
  static constexpr int kTileBytes = kStepBytes / kTiles;
  static constexpr int kStage = stage_bytes(element, bits, kTokens);
  static constexpr int kRows = stage_codes(bits, kTokens);   // where the parts of a stage begin
  static constexpr int kScales = kRows + stage_rows(kTokens);
  static constexpr int kZeros = kScales + stage_scales(element, kTokens);
  static constexpr int kPass = MT <= 2 ? 4 : 2;              // tiles at a time: sums of a group must fit registers
  // 64 tokens: that is not enough. Half of the tokens at a time, sums of a group end with each half step, and half
  // steps are a real loop: unrolled, ptxas begins the next one too early and spills.
  static constexpr bool kTight = MT == 8;
  static constexpr int kPartial = kTight ? MT / 2 : MT;      // of 8 tokens, how many have sums of a group at a time

  struct Place {
    int thread, lane, wn, wk;  // in the CTA
    int block;                 // of columns, of this warp
  };

  const DecodeArguments& a;
  uint32_t shared;
  float sums[kTiles][MT][4];     // of this warp: C fragments, tile by tile

  QCOMPILE_DEVICE explicit Decode(const DecodeArguments& arguments) : a(arguments) {
    shared = shared_base();
    QCOMPILE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      QCOMPILE_UNROLL
      for (int i = 0; i < 4 * MT; ++i) sums[tile][i / 4][i % 4] = 0;
    }
  }

  // With 64 tokens the sums leave no registers for it.
  static QCOMPILE_DEVICE Place place() {
    const int thread = MT == 8 ? thread_x_anew() : thread_x(), warp = thread / kLanes;
    return {thread, thread % kLanes, warp % kBlocks, warp / kBlocks, block_x() * kBlocks + warp % kBlocks};
  }

  // Group of the i-th half step (32 k): i / group_halves, by a multiplication.
  QCOMPILE_DEVICE int group_of(int i) const { return int(uint64_t(uint32_t(i)) * a.group_inverse >> 32); }

  // ---- Copies

  // Where 16-byte chunk i of a step of codes goes. 8 bits: a lane has two chunks, one for each half step; they are put
  // apart, so that lanes read neighbours, and crosswise, so that copies of a warp meet no bank twice.
  static QCOMPILE_DEVICE uint32_t code_chunk(int i) {
    if (bits == 4) return uint32_t(i) * 16;
    return uint32_t(i / 64 * kTileBytes + i % 2 * 512 + ((i / 2 % 32) ^ (i % 2 * 4)) * 16);
  }

  QCOMPILE_DEVICE void copy_codes(int thread, int unit, uint32_t stage) const {
    const int of = thread / kBlockThreads, i = thread % kBlockThreads, copied = block_x() * kBlocks + of;
    if (copied >= a.blocks) return;
    const int first = unit * kUnitSteps;
    const uint8_t* from = a.codes + (int64_t(copied) * a.steps + first) * kStepBytes + i * 16;
    const uint32_t to = stage + uint32_t(of * kUnitSteps * kStepBytes);
    const uint64_t once = once_policy();
    QCOMPILE_UNROLL
    for (int step = 0; step < kUnitSteps; ++step) {
      QCOMPILE_UNROLL
      for (int part = 0; part < bits / 4; ++part) {
        const int beyond = part * kBlockThreads;
        if (first + step >= a.steps) continue;
        copy_async_once(to + uint32_t(step * kStepBytes) + code_chunk(i + beyond),
                        from + step * kStepBytes + beyond * 16, once);
      }
    }
  }

  // A warp copies a row of 256 k; rows that x does not have become zeros.
  QCOMPILE_DEVICE void copy_rows(int thread, int unit, uint32_t stage) const {
    const int k = thread % kLanes * 8, first_row = block_z() * kTokens;
    if (unit * kUnitSteps + k / kStepK >= a.steps) return;
    QCOMPILE_UNROLL
    for (int i = 0; i < kTokens; i += kThreads / kLanes) {
      const int row = i + thread / kLanes;
      const bool inside = first_row + row < a.m;
      const uint16_t* from = a.x + int64_t(inside ? first_row + row : 0) * a.x_stride + unit * kUnitK + k;
      copy_async(stage + uint32_t(kRows + row * kRowStride + k * 2), from, inside ? 16 : 0);
    }
  }

  // Scales and zero points of the groups that the unit touches: neighbours in memory.
  QCOMPILE_DEVICE void copy_groups(int thread, int unit, uint32_t stage) const {
    const int of = thread / kBlockThreads, i = thread % kBlockThreads, copied = block_x() * kBlocks + of;
    if (copied >= a.blocks) return;
    const int first = unit * kUnitSteps, behind = first + kUnitSteps < a.steps ? first + kUnitSteps : a.steps;
    const int group = group_of(2 * first), count = group_of(2 * behind - 1) - group + 1;
    const int64_t at = int64_t(copied) * a.groups + group;
    if (i * 16 < count * kGroupScales) {
      copy_async(stage + uint32_t(kScales + of * kUnitGroups * kGroupScales + i * 16),
                 a.scales + at * kGroupScales + i * 16);
    }
    if (i * 16 < count * kGroupZeros) {
      copy_async(stage + uint32_t(kZeros + of * kUnitGroups * kGroupZeros + i * 16),
                 a.zeros + at * kGroupZeros + i * 16);
    }
  }

  QCOMPILE_DEVICE void copy_unit(int unit, uint32_t stage) const {
    const int thread = place().thread;
    copy_codes(thread, unit, stage);
    copy_rows(thread, unit, stage);
    copy_groups(thread, unit, stage);
  }

  // ---- A step of a unit

  QCOMPILE_DEVICE void load_zeros(const Place& own, uint32_t stage, int group, Zeros<kBfloat, bits>& zeros) const {
    const uint32_t at = stage + uint32_t(kZeros + (own.wn * kUnitGroups + group) * kGroupZeros + own.lane / 4 * bits);
    if constexpr (bits == 4) {
      zeros.set(load_shared(at), 0);
    } else {
      const Words2 words = load_shared_2(at);
      zeros.set(words.x, words.y);
    }
  }

  // Scales of rows g and g + 8 of the pass's tiles, times kHighFactor.
  QCOMPILE_DEVICE void load_scales(const Place& own, uint32_t stage, int group, int pass,
                                   float (&scales)[kPass][2]) const {
    constexpr float high = kHighFactor<kBfloat, bits>;
    const uint32_t lanes = stage + uint32_t(kScales + (own.wn * kUnitGroups + group) * kGroupScales);
    const uint32_t at = lanes + uint32_t((own.lane / 4 * 8 + pass * kPass * 2) * kScaleBytes);
    uint32_t words[kPass * kScaleBytes / 2];
    if constexpr (kPass * kScaleBytes == 4) {
      const Words2 part = load_shared_2(at);
      words[0] = part.x, words[1] = part.y;
    } else {
      QCOMPILE_UNROLL
      for (int i = 0; i < kPass * kScaleBytes / 2; i += 4) {
        const Words4 part = load_shared_4(at + uint32_t(i) * 4);
        words[i] = part.x, words[i + 1] = part.y, words[i + 2] = part.z, words[i + 3] = part.w;
      }
    }
    QCOMPILE_UNROLL
    for (int i = 0; i < kPass; ++i) {
      if constexpr (element == Element::kFloat) {
        scales[i][0] = as_float(words[2 * i]), scales[i][1] = as_float(words[2 * i + 1]) * high;
      } else {
        const uint16_t low = uint16_t(words[i]), upper = uint16_t(words[i] >> 16);
        scales[i][0] = kBfloat ? bfloat_number(low) : half_number(low);
        scales[i][1] = (kBfloat ? bfloat_number(upper) : half_number(upper)) * high;
      }
    }
  }

  // The codes of half step `half` of a tile, as the two A operands of n - z.
  QCOMPILE_DEVICE void load_operands(int lane, uint32_t codes, int half, Words4& words, uint32_t low, uint32_t high,
                                     uint32_t (&operands)[2][4]) const {
    if constexpr (bits == 4 && kTight) {
      const Words2 own = load_shared_2(codes + uint32_t(lane * 16 + half * 8));
      dequantize<kBfloat, bits>(own.x, 0, low, high, operands[0]);
      dequantize<kBfloat, bits>(own.y, 0, low, high, operands[1]);
    } else if constexpr (bits == 4) {  // 16 bytes are the whole step
      if (half == 0) words = load_shared_4(codes + uint32_t(lane) * 16);
      dequantize<kBfloat, bits>(half ? words.z : words.x, 0, low, high, operands[0]);
      dequantize<kBfloat, bits>(half ? words.w : words.y, 0, low, high, operands[1]);
    } else {
      words = load_shared_4(codes + uint32_t(half * 512 + (lane ^ (half * 4)) * 16));
      dequantize<kBfloat, bits>(words.x, words.y, low, high, operands[0]);
      dequantize<kBfloat, bits>(words.z, words.w, low, high, operands[1]);
    }
  }

  // sums += scale * parts for kPartial x 8 tokens, the sums of a group so far; parts begin again.
  QCOMPILE_DEVICE void flush(const float (&scales)[kPass][2], int pass, int first, float (&parts)[kPass][kPartial][4]) {
    QCOMPILE_UNROLL
    for (int i = 0; i < kPass; ++i) {
      QCOMPILE_UNROLL
      for (int j = 0; j < 4 * kPartial; ++j) {
        sums[pass * kPass + i][first + j / 4][j % 4] += scales[i][j % 4 / 2] * parts[i][j / 4][j % 4];
        parts[i][j / 4][j % 4] = 0;
      }
    }
  }

  // Tiles of one pass over a step: two half steps of 32 k, which are two groups if groups have 32 rows.
  QCOMPILE_DEVICE void multiply_pass(const Place& own, uint32_t stage, int pass, int group, bool two_groups) {
    const uint32_t codes = stage + uint32_t((own.wn * kUnitSteps + own.wk) * kStepBytes + pass * kPass * kTileBytes);
    const int k = own.wk * kStepK + own.lane / 8 * 8;  // of the row whose address this lane gives
    const uint32_t rows = stage + uint32_t(kRows + own.lane % 8 * kRowStride + k * 2);
    float parts[kPass][kPartial][4] = {};
    Words4 words[kPass];
    Zeros<kBfloat, bits> zeros;
    load_zeros(own, stage, group, zeros);
    QCOMPILE_UNROLL_BY(kTight ? 1 : 2)
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && two_groups) load_zeros(own, stage, group + 1, zeros);
      uint32_t operands[kPass][2][4];
      QCOMPILE_UNROLL
      for (int i = 0; i < kPass; ++i) {
        const int tile = pass * kPass + i;
        load_operands(own.lane, codes + uint32_t(i * kTileBytes), half, words[i], zeros.pattern(tile, 0),
                      zeros.pattern(tile, 1), operands[i]);
      }
      float scales[kPass][2];
      const bool ends = kTight || half == 1 || two_groups;  // these are the last products of a sum
      QCOMPILE_UNROLL
      for (int m = 0; m < MT; ++m) {
        uint32_t b[4];  // 32 k of 8 tokens: the B operands of two multiplications
        load_matrices_4(rows + uint32_t(m * 8 * kRowStride + half * 64), b);
        QCOMPILE_UNROLL
        for (int i = 0; i < 2 * kPass; ++i) {
          const int j = i / kPass;
          multiply_add<kBfloat>(parts[i % kPass][m % kPartial], operands[i % kPass][j], b[2 * j], b[2 * j + 1]);
        }
        if (m % kPartial < kPartial - 1 || !ends) continue;
        if (m < kPartial) load_scales(own, stage, group + (two_groups ? half : 0), pass, scales);
        flush(scales, pass, m - m % kPartial, parts);
      }
    }
  }

  QCOMPILE_DEVICE void multiply_step(int unit, uint32_t stage) {
    const Place own = place();
    const int step = unit * kUnitSteps + own.wk;
    if (step >= a.steps || own.block >= a.blocks) return;
    const int group = group_of(2 * step) - group_of(2 * unit * kUnitSteps);
    QCOMPILE_UNROLL
    for (int pass = 0; pass < kTiles / kPass; ++pass) multiply_pass(own, stage, pass, group, a.group_halves == 1);
  }

  // ---- The pipeline

  QCOMPILE_DEVICE void wait_for_stage() const {  // all copies but those of the latest stages - 2 units
    if (a.stages == 2) copy_async_wait<0>();
    else if (a.stages == 3) copy_async_wait<1>();
    else copy_async_wait<2>();
  }

  QCOMPILE_DEVICE void multiply() {
    const int begin = block_y() * a.units_of_a_cta;
    const int end = begin + a.units_of_a_cta < a.units ? begin + a.units_of_a_cta : a.units;
    const uint32_t behind = shared + uint32_t(a.stages * kStage);
    uint32_t stage = shared, filled = shared;  // which is multiplied next; which is copied to next
    for (int i = 0; i < a.stages - 1; ++i, filled += kStage) {
      if (begin + i < end) copy_unit(begin + i, filled);
      copy_async_commit();
    }
    for (int unit = begin; unit < end; ++unit) {
      wait_for_stage();
      block_barrier();  // copies of all threads are there, and nobody reads the stage that is filled next
      if (unit + a.stages - 1 < end) copy_unit(unit + a.stages - 1, filled);
      copy_async_commit();
      multiply_step(unit, stage);
      stage = stage + kStage == behind ? shared : stage + kStage;
      filled = filled + kStage == behind ? shared : filled + kStage;
    }
    copy_async_wait<0>();
    block_barrier();
  }
};

}  // namespace qcompile::cuda
