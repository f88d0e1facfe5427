// vpdpbusd on 256 bits: 32 codes (unsigned) times 32 activations (signed), fours of them added to 8 sums.
//
// One source for two encodings: the including file says how a `dot` is written. avxvnni.cpp (VEX, 16 registers) is what
// processors without AVX-512 have; avx512vl.cpp (EVEX) runs the same code where that one cannot run.
//
// A tile is up to 6 int8 rows. Its panel is walked once with 1 row, in two halves with 2, in quarters from 3 rows on:
// 12 registers of sums, 2 of codes, one of activations and one mask of nibbles are the 16.
#pragma once

#if !defined(__clang__)
#pragma GCC optimize("no-tree-pre")  // gcc 12 would carry loads over to the next block, and spill the sums for it
#endif

#include "vector256.h"

namespace qcompile {
namespace {

constexpr int kTileRows = 6;

inline __m256i dot(__m256i sums, __m256i codes, __m256i activations);

template <int kRows>
constexpr int columns_at_once() { return kRows == 1 ? 8 : kRows == 2 ? 4 : 2; }

// Columns of two vectors: sums[r][j] and sums[r][j + 1] += codes of 4 rows k times the activations.
template <int kRows, int kCount>
inline void add_rows(__m256i codes, __m256i next, const int8_t* activations, int j, __m256i (&sums)[kRows][kCount]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m256i four = broadcast(activations + 4 * r);
    sums[r][j] = dot(sums[r][j], codes, four);
    sums[r][j + 1] = dot(sums[r][j + 1], next, four);
  }
}

template <int kRows, int kFormat, int kCount>
inline void add_block(const uint8_t* block, const int8_t* activations, __m256i (&sums)[kRows][kCount]) {
#pragma GCC unroll 8
  for (int j = 0; j < kCount; j += 2) {
    const __m256i codes = load(block + 32 * j), next = load(block + 32 * j + 32);
    add_rows<kRows, kCount>(integers<kFormat, 0>(codes), integers<kFormat, 0>(next), activations, j, sums);
    if constexpr (kFormats[kFormat].bits == 8) continue;
    const __m256i high = integers<kFormat, 1>(codes), next_high = integers<kFormat, 1>(next);
    add_rows<kRows, kCount>(high, next_high, activations + 4 * kRows, j, sums);
  }
}

template <int kRows, int kFormat, bool kWide>
inline void multiply_group(const Layout& layout, const Group& group, float* out) {
  constexpr int count = columns_at_once<kRows>(), block_rows = kFormats[kFormat].block_rows();
  const int64_t blocks = group.depth / block_rows;
  for (int first = 0; first < kVectors; first += count) {
    __m256i sums[kRows][count];
    start<kRows, kFormat, count>(group, first, sums);
    const uint8_t* block = group.blocks + 32 * first;
    const uint8_t* ahead = fetch_from(layout, group, first);
    const int8_t* activations = group.activations;
    for (int64_t i = 0; i < blocks; ++i, block += kBlockBytes, activations += block_rows * kRows) {
      if (group.cold) fetch<count>(ahead);
      add_block<kRows, kFormat, count>(block, activations, sums);
    }
    finish<kRows, count, kWide>(layout, group, first, sums, out);
  }
}

}  // namespace
}  // namespace qcompile
