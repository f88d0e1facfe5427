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

inline __m256i low_nibbles(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }

template <int kRows, int kBits, int kCount>
inline void add_block(const uint8_t* block, const int8_t* activations, __m256i (&sums)[kRows][kCount]) {
#pragma GCC unroll 8
  for (int j = 0; j < kCount; j += 2) {
    const __m256i codes = load(block + 32 * j), next = load(block + 32 * j + 32);
    if (kBits == 8) {
      add_rows<kRows, kCount>(codes, next, activations, j, sums);
    } else {
      add_rows<kRows, kCount>(low_nibbles(codes), low_nibbles(next), activations, j, sums);
      add_rows<kRows, kCount>(high_nibbles(codes), high_nibbles(next), activations + 4 * kRows, j, sums);
    }
  }
}

template <int kRows, int kBits, bool kWide>
inline void multiply_group(const Layout& layout, const Group& group, float* out) {
  constexpr int count = columns_at_once<kRows>();
  const int64_t blocks = group.depth / (kBits == 4 ? 8 : 4);
  for (int first = 0; first < kVectors; first += count) {
    __m256i sums[kRows][count];
    start<kRows, count>(layout, group, first, sums);
    const uint8_t* block = group.blocks + 32 * first;
    const uint8_t* ahead = fetch_from(layout, group, first);
    const int8_t* activations = group.activations;
    for (int64_t i = 0; i < blocks; ++i, block += kBlockBytes, activations += kBits == 4 ? 8 * kRows : 4 * kRows) {
      if (group.cold) fetch<count>(ahead);
      add_block<kRows, kBits, count>(block, activations, sums);
    }
    finish<kRows, count, kWide>(layout, group, first, sums, out);
  }
}

}  // namespace
}  // namespace qcompile
