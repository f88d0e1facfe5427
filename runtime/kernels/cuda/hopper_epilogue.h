// From the accumulators of the Hopper kernel to y: sums of several CTAs added up, bias, rows of y. Unverified on GPU.
#pragma once

#include "hopper_work.h"

// For loops within others that are unrolled: code that runs once should be small.
#if defined(__CUDACC__)
#define QCOMPILE_KEEP_LOOP _Pragma("unroll 1")
#else
#define QCOMPILE_KEEP_LOOP
#endif

namespace qcompile::cuda::hopper {

// Sums of which this CTA has a part: writes it, and returns false unless all others have written theirs; then d is the
// whole sum, added up in order of k, whoever is last. Partial sums lie as accumulators do, four of a thread together.
template <int kTokens>
QCOMPILE_DEVICE bool add_up(const Arguments& p, const Shared<kTokens>& shared, int consumer, const Work& work,
                            float (&d)[kTokens / 2]) {
  const int thread = thread_x() % 128, split = grid_y();
  const int64_t one = kTokens * p.layout.padded_n;  // floats of a tile of rows
  float* const sums = p.partials + int64_t(block_z()) * split * one + (work.first_block + consumer) * kBlockN * kTokens;
  float* const own = sums + block_y() * one;
  QCOMPILE_UNROLL
  for (int i = 0; i < kTokens / 2; i += 4) {
    const Words4 four = {as_bits(d[i]), as_bits(d[i + 1]), as_bits(d[i + 2]), as_bits(d[i + 3])};
    store_global(reinterpret_cast<Words4*>(own + i * 128 + thread * 4), four);
  }
  thread_fence();
  const int threads = 128 * work.blocks;
  sm90::threads_barrier(1 + kConsumers, 128, threads);
  uint32_t* const counter = p.counters + int64_t(block_z()) * grid_x() + block_x();
  if (thread_x() == 128) store_shared(shared.flag(), atomic_increment(counter));
  sm90::threads_barrier(1 + kConsumers, 128, threads);
  if (load_shared(shared.flag()) + 1 < uint32_t(split)) return false;
  thread_fence();
  if (thread_x() == 128) store_global(counter, uint32_t(0));
  QCOMPILE_UNROLL
  for (int i = 0; i < kTokens / 2; i += 4) {
    d[i] = d[i + 1] = d[i + 2] = d[i + 3] = 0;
    QCOMPILE_KEEP_LOOP
    for (int part = 0; part < split; ++part) {
      const Words4 four = load_global_written(sums + part * one + i * 128 + thread * 4);
      d[i] += as_float(four.x);
      d[i + 1] += as_float(four.y);
      d[i + 2] += as_float(four.z);
      d[i + 3] += as_float(four.w);
    }
  }
  return true;
}

// 32 rows of y from the chunk in shared memory, by 128 threads, 16 bytes at a time where rows of y allow it.
QCOMPILE_DEVICE void store_chunk(const Arguments& p, uint32_t chunk, int thread, int64_t first_n, int64_t first_m) {
  constexpr int kPieces = kBlockN / 8, kRows = 128 / kPieces;
  const int64_t n = p.layout.n, column = first_n + thread % kPieces * 8;
  const int columns = n - column < 8 ? int(n - column) : 8;
  const bool wide = columns == 8 && n % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  const uint32_t from = chunk + uint32_t(thread / kPieces * kChunkRowBytes + thread % kPieces * 16);
  uint16_t* to = p.y + (first_m + thread / kPieces) * n + column;
  QCOMPILE_KEEP_LOOP
  for (int i = 0; i < kChunkTokens; i += kRows) {
    if (first_m + thread / kPieces + i >= p.m) break;
    if (wide) {
      store_global(reinterpret_cast<Words4*>(to + i * n), load_shared_4(from + uint32_t(i * kChunkRowBytes)));
      continue;
    }
    QCOMPILE_KEEP_LOOP
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
  const int first_thread = thread_x() - thread;
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
    sm90::threads_barrier(1 + consumer, first_thread, 128);
    store_chunk(p, chunk, thread, first_n, chunk_m);
    sm90::threads_barrier(1 + consumer, first_thread, 128);
  }
}

}  // namespace qcompile::cuda::hopper
