// The kernel for many rows on Hopper: TMA and wgmma, weights dequantized in registers. Unverified on GPU.
//
// A CTA computes 128 columns (two blocks) for kTokens rows of x. One thread copies stages of 64 k to shared memory. Two
// warpgroups turn the codes of a block each into A registers and multiply them with the stage's tile of x. While the
// tensor cores work on a step, its warpgroup converts the next one into a second set of registers.
#pragma once

#include <cstdint>

#include "device_sm90.h"
#include "hopper_dequant.h"
#include "hopper_limits.h"

namespace qcompile::cuda::hopper {

// The grid is (pairs of blocks, 1, tiles of rows). The tensor map: x (m, padded_k), boxes of (kTokens, 64), swizzled.
struct Arguments {
  Layout layout;
  const uint8_t *codes, *scales, *zeros;  // as in layout.h
  const uint16_t* bias;                   // (n,) or nullptr
  uint16_t* y;                            // (m, n)
  int64_t m;
};

// ---- Addresses in shared memory: tiles of x first, each where the swizzle begins; then blocks, chunks, barriers.
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

// ---- The thread that copies. blocks: 1 or 2, those of this CTA that exist.
template <int kTokens>
QCOMPILE_DEVICE void copy_stages(const sm90::TensorMap* map, const Arguments& p, const Shared<kTokens>& shared,
                                 int64_t first_block, int blocks, int row) {
  const Layout& layout = p.layout;
  const int64_t steps = layout.steps(), groups = layout.groups(), steps_of_group = layout.group / kStepK;
  const uint32_t step_groups = layout.group < kStepK ? kStepGroups : 1;
  const uint32_t scale_bytes = step_groups * kBlockN * 2, zero_bytes = step_groups * kBlockN / 2;
  const uint32_t bytes = tile_bytes(kTokens) + uint32_t(blocks) * (kCodeBytes + scale_bytes + zero_bytes);
  int64_t group = 0, left = steps_of_group;
  Place<Shared<kTokens>::kStages> place;
  for (int64_t step = 0; step < steps; ++step) {
    const uint32_t full = shared.full(place.stage);
    sm90::barrier_wait(shared.empty(place.stage), (place.round + 1) % 2);  // the first round finds them empty
    sm90::barrier_arrive_expect(full, bytes);
    sm90::copy_tile(shared.tile(place.stage), map, int32_t(step * kStepK), row, full);
    for (int i = 0; i < blocks; ++i) {
      const uint32_t to = shared.block(place.stage, i);
      const int64_t block = first_block + i, at = block * groups + group;
      sm90::copy_bulk(to, p.codes + (block * steps + step) * kCodeBytes, kCodeBytes, full);
      sm90::copy_bulk(to + kCodeBytes, p.scales + at * (kBlockN * 2), scale_bytes, full);
      sm90::copy_bulk(to + kCodeBytes + kScaleBytes, p.zeros + at * (kBlockN / 2), zero_bytes, full);
    }
    if (step_groups > 1) {
      group += kStepGroups;
    } else if (--left == 0) {
      ++group, left = steps_of_group;
    }
    place.advance();
  }
}

// ---- A warpgroup that multiplies.

// A registers of the four operands of a step.
struct Fragments {
  uint32_t a[4][4];
};

// The codes of a stage to A registers. two_groups: of 32 rows, one for each half of the step.
template <Element kElement>
QCOMPILE_DEVICE void convert(uint32_t block, bool two_groups, int tile, int lane, Fragments& fragments) {
  const Words4 codes = load_shared_4(block + uint32_t(tile * kLanes + lane) * 16);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  const uint32_t scales = block + kCodeBytes + uint32_t(lane / 4 * 16 + tile * 4);
  const uint32_t zeros = block + kCodeBytes + kScaleBytes + uint32_t(lane / 4 * 4);
  const int nibble = 4 * zero_nibble(tile, 0);
  QCOMPILE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t second = two_groups ? uint32_t(half) : 0;
    const uint32_t scale = load_shared(scales + second * (kBlockN * 2));
    const uint32_t zero = load_shared(zeros + second * (kBlockN / 2));
    const GroupOfLane group = make_group<kElement>(scale, zero >> nibble);
    dequantize<kElement>(words[2 * half], group, fragments.a[2 * half]);
    dequantize<kElement>(words[2 * half + 1], group, fragments.a[2 * half + 1]);
  }
}

// Descriptor of a tile of x for wgmma (PTX ISA, matrix descriptor): its address, K-major with a 128-byte swizzle: rows
// of 128 bytes, the next 8 rows 1024 bytes on; the leading offset is not used then. Operand p begins 32 p bytes on.
QCOMPILE_DEVICE uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1, kStride = 8 * kStepK * 2 / 16, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// Multiplies one stage into d; `fragments` are those of the step before the last, which is done.
template <Element kElement, int kTokens>
QCOMPILE_DEVICE void multiply_step(const Shared<kTokens>& shared, int consumer, bool two_groups,
                                   Place<Shared<kTokens>::kStages>& place, Fragments& fragments,
                                   float (&d)[kTokens / 2]) {
  const int tile = thread_x() % 128 / kLanes, lane = thread_x() % kLanes;
  sm90::barrier_wait(shared.full(place.stage), place.round % 2);
  convert<kElement>(shared.block(place.stage, consumer), two_groups, tile, lane, fragments);
  QCOMPILE_UNROLL
  for (int part = 0; part < 4; ++part) sm90::settle(fragments.a[part]);
  sm90::wgmma_fence();
  const uint64_t x = tile_descriptor(shared.tile(place.stage));
  QCOMPILE_UNROLL
  for (int part = 0; part < 4; ++part) {
    sm90::wgmma<kElement == Element::kHalf, kTokens>(d, fragments.a[part], x + uint64_t(part * 32 / 16));
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<1>();  // the step before this one is done: its stage is free, and its registers
  if (place.stage + place.round > 0) {
    warp_barrier();
    const int last = place.stage ? place.stage - 1 : Shared<kTokens>::kStages - 1;
    if (lane == 0) sm90::barrier_arrive(shared.empty(last));
  }
  place.advance();
}

// 32 rows of y from the chunk in shared memory, by 128 threads, 16 bytes at a time where rows of y allow it.
QCOMPILE_DEVICE void store_chunk(const Arguments& p, uint32_t chunk, int thread, int64_t first_n, int64_t first_m) {
  constexpr int kPieces = kBlockN / 8, kRows = 128 / kPieces;
  const int64_t n = p.layout.n, column = first_n + thread % kPieces * 8;
  const int columns = n - column < 8 ? int(n - column) : 8;
  const bool wide = columns == 8 && n % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  const uint32_t from = chunk + uint32_t(thread / kPieces * kChunkRowBytes + thread % kPieces * 16);
  uint16_t* to = p.y + (first_m + thread / kPieces) * n + column;
  QCOMPILE_UNROLL
  for (int i = 0; i < kChunkTokens; i += kRows) {
    if (first_m + thread / kPieces + i >= p.m) break;
    if (wide) {
      store_global(reinterpret_cast<Words4*>(to + i * n), load_shared_4(from + uint32_t(i * kChunkRowBytes)));
      continue;
    }
    for (int e = 0; e < columns; ++e) {
      const uint32_t pair = load_shared(from + uint32_t(i * kChunkRowBytes + e / 2 * 4));
      store_global(to + i * n + e, uint16_t(pair >> (16 * (e % 2))));
    }
  }
}

// Columns of y (m, n) from d: 32 tokens at a time to shared memory, as rows of 64 columns, and out in 16-byte pieces.
template <Element kElement, int kTokens>
QCOMPILE_DEVICE void store_block(const Arguments& p, uint32_t chunk, int consumer, int64_t first_n, int64_t first_m,
                                 const float (&d)[kTokens / 2]) {
  const int thread = thread_x() % 128, tile = thread / kLanes, lane = thread % kLanes, g = lane / 4, t = lane % 4;
  const int64_t n = p.layout.n;
  const bool odd = g % 2;
  float bias[2] = {0, 0};
  QCOMPILE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t column = first_n + tile * kTile + 8 * h + g;
    if (!p.bias || column >= n) continue;
    const uint16_t bits = load_global(p.bias + column);
    bias[h] = kElement == Element::kHalf ? half_number(bits) : bfloat_number(bits);
  }
  const auto round = [](float value) -> uint32_t {
    return kElement == Element::kHalf ? half_bits(value) : bfloat_bits(value);
  };
  QCOMPILE_UNROLL
  for (int c = 0; c < kTokens / kChunkTokens; ++c) {
    const int64_t chunk_m = first_m + c * kChunkTokens;
    if (chunk_m >= p.m) break;
    // Lanes hold rows g (columns of y) for tokens 2t and 2t + 1. Neighbours g, g ^ 1 trade tokens, so that each has two
    // neighbouring columns of one token: 32 bits, and no two lanes of a warp in one bank.
    QCOMPILE_UNROLL
    for (int i = 0; i < kChunkTokens / 8 * 2; ++i) {
      const int j = (c * (kChunkTokens / 8) * 2 + i) * 2, h = i % 2;
      const uint32_t own = round(d[j] + bias[h]) | round(d[j + 1] + bias[h]) << 16;
      const uint32_t word = permute(own, shuffle_xor(own, 4), odd ? 0x3276 : 0x5410);
      const int token = i / 2 * 8 + 2 * t + odd, column = tile * kTile + 8 * h + g - odd;
      store_shared(chunk + uint32_t(token * kChunkRowBytes + column * 2), word);
    }
    sm90::warpgroup_barrier(1 + consumer);
    store_chunk(p, chunk, thread, first_n, chunk_m);
    sm90::warpgroup_barrier(1 + consumer);
  }
}

template <Element kElement, int kTokens>
QCOMPILE_DEVICE void multiply_stages(const Arguments& p, const Shared<kTokens>& shared, int consumer,
                                     int64_t first_block, int64_t first_m) {
  const bool two_groups = p.layout.group < kStepK;
  const int64_t steps = p.layout.steps();
  float d[kTokens / 2];
  QCOMPILE_UNROLL
  for (int i = 0; i < kTokens / 2; ++i) d[i] = 0;
  Fragments even, odd;
  Place<Shared<kTokens>::kStages> place;
  for (int64_t step = 0; step + 1 < steps; step += 2) {
    multiply_step<kElement>(shared, consumer, two_groups, place, even, d);
    multiply_step<kElement>(shared, consumer, two_groups, place, odd, d);
  }
  if (steps % 2) multiply_step<kElement>(shared, consumer, two_groups, place, even, d);
  sm90::wgmma_wait<0>();
  sm90::settle(d);
  store_block<kElement, kTokens>(p, shared.chunk(consumer), consumer, (first_block + consumer) * kBlockN, first_m, d);
}

// ---- The kernel

template <Element kElement, int kTokens>
QCOMPILE_DEVICE void product(const sm90::TensorMap* map, const Arguments& p) {
  const uint32_t base = (shared_base() + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const Shared<kTokens> shared{base};
  const int64_t first_block = int64_t(block_x()) * kConsumers, first_m = int64_t(block_z()) * kTokens;
  const int blocks = first_block + 1 < p.layout.blocks() ? 2 : 1;
  if (thread_x() == 0) {
    for (int stage = 0; stage < Shared<kTokens>::kStages; ++stage) {
      sm90::barrier_init(shared.full(stage), 1);
      sm90::barrier_init(shared.empty(stage), uint32_t(blocks) * 4);  // each warp of each warpgroup
    }
    sm90::barrier_init_fence();
  }
  block_barrier();
  const int warpgroup = thread_x() / 128;
  if (warpgroup == 0) {
    sm90::registers_decrease<40>();
    if (thread_x() == 0) copy_stages<kTokens>(map, p, shared, first_block, blocks, int(first_m));
  } else {
    sm90::registers_increase<232>();  // (40 + 2 * 232) * 128 is less than the 65536 of a multiprocessor
    if (warpgroup <= blocks) multiply_stages<kElement>(p, shared, warpgroup - 1, first_block, first_m);
  }
}

}  // namespace qcompile::cuda::hopper
