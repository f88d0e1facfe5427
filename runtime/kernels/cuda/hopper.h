// The kernel for many rows on Hopper: TMA and wgmma, weights dequantized in registers. Unverified on GPU.
//
// A CTA computes 128 columns (two blocks) for kTokens rows of x. One thread copies stages of 64 k to shared memory. Two
// warpgroups turn the codes of a block each into A registers and multiply them with the stage's tile of x. While the
// tensor cores work on a step, its warpgroup converts the next one into a second set of registers.
#pragma once

#include "hopper_dequant.h"
#include "hopper_epilogue.h"
#include "hopper_work.h"

namespace qcompile::cuda::hopper {

// ---- The thread that copies.
template <int kTokens>
QCOMPILE_DEVICE void copy_stages(const sm90::TensorMap* map, const Arguments& p, const Shared<kTokens>& shared,
                                 const Work& work) {
  const Layout& layout = p.layout;
  const int64_t steps = layout.steps(), groups = layout.groups(), steps_of_group = layout.group / kStepK;
  const uint32_t step_groups = layout.group < kStepK ? kStepGroups : 1;
  const uint32_t scale_bytes = step_groups * kBlockN * 2, zero_bytes = step_groups * kBlockN / 2;
  const uint32_t bytes = tile_bytes(kTokens) + uint32_t(work.blocks) * (kCodeBytes + scale_bytes + zero_bytes);
  int64_t group = work.begin * kStepK / layout.group;
  int64_t left = steps_of_group ? steps_of_group - work.begin % steps_of_group : 0;
  Place<Shared<kTokens>::kStages> place;
  for (int64_t step = work.begin; step < work.end; ++step) {
    const uint32_t full = shared.full(place.stage);
    sm90::barrier_wait(shared.empty(place.stage), (place.round + 1) % 2);  // the first round finds them empty
    sm90::barrier_arrive_expect(full, bytes);
    sm90::copy_tile(shared.tile(place.stage), map, int32_t(step * kStepK), int32_t(work.first_m), full);
    for (int i = 0; i < work.blocks; ++i) {
      const uint32_t to = shared.block(place.stage, i);
      const int64_t block = work.first_block + i, at = block * groups + group;
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
  GroupOfLane group = make_group<kElement>(load_shared(scales), load_shared(zeros) >> nibble);
  dequantize<kElement>(words[0], group, fragments.a[0]);
  dequantize<kElement>(words[1], group, fragments.a[1]);
  if (two_groups) {  // the same for all threads
    group = make_group<kElement>(load_shared(scales + kBlockN * 2), load_shared(zeros + kBlockN / 2) >> nibble);
  }
  dequantize<kElement>(words[2], group, fragments.a[2]);
  dequantize<kElement>(words[3], group, fragments.a[3]);
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

template <Element kElement, int kTokens>
QCOMPILE_DEVICE void multiply_stages(const Arguments& p, const Shared<kTokens>& shared, int consumer,
                                     const Work& work) {
  const bool two_groups = p.layout.group < kStepK;
  const int64_t steps = work.end - work.begin;  // at most 0 where there are more CTAs than steps
  float d[kTokens / 2];
  QCOMPILE_UNROLL
  for (int i = 0; i < kTokens / 2; ++i) d[i] = 0;
  Fragments even, odd;
  Place<Shared<kTokens>::kStages> place;
  for (int64_t step = 0; step + 1 < steps; step += 2) {
    multiply_step<kElement>(shared, consumer, two_groups, place, even, d);
    multiply_step<kElement>(shared, consumer, two_groups, place, odd, d);
  }
  if (steps > 0 && steps % 2) multiply_step<kElement>(shared, consumer, two_groups, place, even, d);
  sm90::wgmma_wait<0>();
  sm90::settle(d);
  if (grid_y() > 1 && !add_up<kTokens>(p, shared, consumer, work, d)) return;
  const int64_t first_n = (work.first_block + consumer) * kBlockN;
  store_block<kElement, kTokens>(p, shared.chunk(consumer), consumer, first_n, work.first_m, d);
}

// ---- The kernel

template <Element kElement, int kTokens>
QCOMPILE_DEVICE void product(const sm90::TensorMap* map, const Arguments& p) {
  const uint32_t base = (shared_base() + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const Shared<kTokens> shared{base};
  const Work work = work_of_block(p.layout, kTokens);
  if (thread_x() == 0) {
    sm90::prefetch_map(map);
    for (int stage = 0; stage < Shared<kTokens>::kStages; ++stage) {
      sm90::barrier_init(shared.full(stage), 1);
      sm90::barrier_init(shared.empty(stage), uint32_t(work.blocks) * 4);  // each warp of each warpgroup
    }
    sm90::barrier_init_fence();
  }
  block_barrier();
  const int warpgroup = thread_x() / 128;
  if (warpgroup == 0) {
    sm90::registers_decrease<40>();
    if (thread_x() == 0) copy_stages<kTokens>(map, p, shared, work);
  } else {
    sm90::registers_increase<232>();  // (40 + 2 * 232) * 128 is less than the 65536 of a multiprocessor
    if (warpgroup <= work.blocks) multiply_stages<kElement>(p, shared, warpgroup - 1, work);
  }
}

}  // namespace qcompile::cuda::hopper
