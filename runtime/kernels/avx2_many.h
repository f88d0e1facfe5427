// AVX2, many rows of a format with a table: a group's levels are decoded once for all rows of a tile of up to 32, and
// laid out in the order in which they are read, two vectors of columns after one another. Included by avx2.cpp alone.
//
// Small levels (mxfp4) stay bytes: vpmaddubsw adds two products, and 16 bits hold a run of blocks.
//
// Large ones (nf4) fill 16 bits with one pair of products. Winograd's identity halves the multiplications, in 16 bits:
//
//     (t0 + a1) (t1 + a0) = t0 a0 + t1 a1 + t0 t1 + a0 a1
//
// for levels t of rows k, k + 1 and their activations a. What is too much is a sum over a column's levels alone and one
// over a row's activations alone: sums start from minus both, once a group. Four instructions remain for 32 products
// (two additions, vpmaddwd, an addition), as many as `add_signed` has, but only one of them is a multiplication:
// processors run two of these a cycle, and four additions. Factors are 255 at most: 32 pairs of products fit 32 bits.
#pragma once

#include <cstring>

#include "vector256.h"

namespace qcompile {
namespace {

constexpr int kAtOnce = 4;    // rows of a tile in registers
constexpr int kTwo = 2 * 32;  // bytes of two vectors of columns

inline void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
inline __m256i even_words(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
inline __m256i odd_words(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// put(the integers of four rows k, less kLess) for all rows of one vector of columns, in their order.
template <int kFormat, int kLess, typename Put>
inline void decode_vector(const Group& group, int vector, const uint8_t*& ahead, const Put& put) {
  const uint8_t* block = group.blocks + 32 * vector;
  for (int64_t k = 0; k < group.depth; k += kFormats[kFormat].block_rows(), block += kBlockBytes) {
    if (group.cold && vector % 2 == 0) fetch<2>(ahead);
    const __m256i codes = load(block);
    put(integers<kFormat, 0, kLess>(codes));
    put(integers<kFormat, 1, kLess>(codes));
  }
}

// Integers as bytes: (vectors / 2, depth / 4, 2, 32).
template <int kFormat, int kRun>
class SmallLevels {
 public:
  void decode(const Layout& layout, const Group& group, int rows) {
    stride_ = 4 * rows;
    const uint8_t* ahead = fetch_from(layout, group, 0);
    for (int j = 0; j < kVectors; ++j) {
      int8_t* to = levels_ + j / 2 * (group.depth / 4 * kTwo) + j % 2 * 32;
      decode_vector<kFormat, 0>(group, j, ahead, [&](__m256i integers) __attribute__((always_inline)) {
        store(to, integers);
        to += kTwo;
      });
    }
  }

  // sums (kRows, 16 columns from vector `first` on) = the products of the rows from `row` on, at which `group` stands
  template <int kRows>
  void multiply(const Group& group, int /*row*/, int first, __m256i (&sums)[kRows][2]) const {
    const int8_t *levels = levels_ + first / 2 * (group.depth / 4 * kTwo), *activations = group.activations;
    start<kRows, kFormat, 2>(group, first, sums);
    for (int64_t left = group.depth / 4; left > 0;) {
      const int64_t run = left < 2 * kRun ? left : 2 * kRun;  // of four rows k: a block has two
      left -= run;
      __m256i narrow[kRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
      for (int64_t i = 0; i < run; ++i, levels += kTwo, activations += stride_) {
        const __m256i some = load(levels), next = load(levels + 32);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256i four = broadcast(activations + 4 * r);
          narrow[r][0] = _mm256_add_epi16(narrow[r][0], _mm256_maddubs_epi16(some, four));
          narrow[r][1] = _mm256_add_epi16(narrow[r][1], _mm256_maddubs_epi16(next, four));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(narrow[r][j], _mm256_set1_epi16(1)));
        }
      }
    }
  }

 private:
  alignas(32) int8_t levels_[kMaxDepth * kPanel];
  int64_t stride_;
};

// Levels t (-127 … 127) and activations a as words, of every four rows k the even and the odd ones:
// (vectors / 2, depth / 4, even and odd, 2, 16) and (depth / 4, even and odd, kMaxRows, 2).
template <int kFormat>
class LargeLevels {
 public:
  void decode(const Layout& layout, const Group& group, int rows) {
    const uint8_t* ahead = fetch_from(layout, group, 0);
    for (int j = 0; j < kVectors; ++j) {
      int8_t* to = levels_ + j / 2 * (group.depth / 4 * 2 * kTwo) + j % 2 * 32;
      __m256i share = _mm256_setzero_si256();
      constexpr int middle = kFormats[kFormat].middle;
      decode_vector<kFormat, middle>(group, j, ahead, [&](__m256i levels) __attribute__((always_inline)) {
        const __m256i even = even_words(levels), odd = odd_words(levels);
        store(to, even);
        store(to + kTwo, odd);
        share = _mm256_add_epi32(share, _mm256_madd_epi16(even, odd));
        to += 2 * kTwo;
      });
      levels_share_[j] = share;
    }
    split(group.activations, group.depth, rows);
  }

  template <int kRows>
  void multiply(const Group& group, int row, int first, __m256i (&sums)[kRows][2]) const {
    const int8_t *levels = levels_ + first / 2 * (group.depth / 4 * 2 * kTwo), *activations = activations_ + 4 * row;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i share = _mm256_set1_epi32(-activations_share_[row + r]);
      sums[r][0] = _mm256_sub_epi32(share, levels_share_[first]);
      sums[r][1] = _mm256_sub_epi32(share, levels_share_[first + 1]);
    }
    for (int64_t k = 0; k < group.depth; k += 4, levels += 2 * kTwo, activations += 2 * kFour) {
      const __m256i even = load(levels), next_even = load(levels + 32);
      const __m256i odd = load(levels + kTwo), next_odd = load(levels + kTwo + 32);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i a0 = broadcast(activations + 4 * r), a1 = broadcast(activations + kFour + 4 * r);
        const __m256i product = _mm256_madd_epi16(_mm256_add_epi16(even, a1), _mm256_add_epi16(odd, a0));
        const __m256i next = _mm256_madd_epi16(_mm256_add_epi16(next_even, a1), _mm256_add_epi16(next_odd, a0));
        sums[r][0] = _mm256_add_epi32(sums[r][0], product);
        sums[r][1] = _mm256_add_epi32(sums[r][1], next);
        asm volatile("");  // one row after another: 16 registers hold no more
      }
    }
  }

 private:
  static constexpr int kFour = 4 * kMaxRows;  // bytes of four rows k, as int8 and as even or odd words

  // 8 rows at a time, 4 of a tile of 5 to 7; the last are the tile's last ones, some of them a second time.
  void split(const int8_t* activations, int64_t depth, int rows) {
    const int step = rows < 8 ? 4 : 8;
    for (int row = 0; row < rows; row += step) {
      const int at = row < rows - step ? row : rows - step;
      rows < 8 ? split_four(activations, depth, rows, at) : split_eight(activations, depth, rows, at);
    }
  }

  void split_eight(const int8_t* activations, int64_t depth, int rows, int row) {
    __m256i share = _mm256_setzero_si256();
    int8_t* to = activations_ + 4 * row;
    const int8_t* from = activations + 4 * row;
    for (int64_t k = 0; k < depth; k += 4, from += 4 * rows, to += 2 * kFour) {
      const __m256i four = load(from), even = even_words(four), odd = odd_words(four);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), even);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kFour), odd);
      share = _mm256_add_epi32(share, _mm256_madd_epi16(even, odd));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(activations_share_ + row), share);
  }

  void split_four(const int8_t* activations, int64_t depth, int rows, int row) {
    __m128i share = _mm_setzero_si128();
    int8_t* to = activations_ + 4 * row;
    const int8_t* from = activations + 4 * row;
    for (int64_t k = 0; k < depth; k += 4, from += 4 * rows, to += 2 * kFour) {
      const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      const __m128i even = _mm_srai_epi16(_mm_slli_epi16(four, 8), 8), odd = _mm_srai_epi16(four, 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), even);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kFour), odd);
      share = _mm_add_epi32(share, _mm_madd_epi16(even, odd));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(activations_share_ + row), share);
  }

  alignas(32) int8_t levels_[2 * kMaxDepth * kPanel];
  alignas(32) int8_t activations_[2 * kMaxDepth * kMaxRows];
  __m256i levels_share_[kVectors];        // of t0 t1, by columns
  int32_t activations_share_[kMaxRows];  // of a0 a1, by rows
};

// out += the product of one group and up to kRows of `rows` rows from `row` on, at which `group` stands.
template <int kRows, bool kWide, typename Decoded>
inline void multiply_some(const Layout& layout, const Group& group, const Decoded& decoded, int row, int rows,
                          float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_some<kRows - 1, kWide>(layout, group, decoded, row, rows, out);
  }
  if constexpr (kRows % 2 == 0 || !kWide) {
    for (int first = 0; first < kVectors; first += 2) {
      __m256i sums[kRows][2];
      decoded.template multiply<kRows>(group, row, first, sums);
      finish<kRows, 2, kWide>(layout, group, first, sums, out);
    }
  }
}

template <bool kWide, typename Decoded>
void multiply_many(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  constexpr int step = kWide ? 2 : 1;
  const int64_t groups = layout.groups();
  Decoded decoded;
  std::memset(out, 0, sizeof(float) * size_t(tile.rows / step) * kPanel);
  for (int64_t g = 0; g < groups; ++g, panel += layout.group_bytes()) {
    Group group = group_of(layout, panel, tile, g);
    decoded.decode(layout, group, tile.rows);
    for (int row = 0; row < tile.rows; row += kAtOnce) {
      multiply_some<kAtOnce, kWide>(layout, group, decoded, row, tile.rows - row, out + row / step * kPanel);
      group.activations += 4 * kAtOnce;
      group.sum += kAtOnce * groups;
      group.row_scale += kAtOnce / step * groups;
    }
  }
}

}  // namespace
}  // namespace qcompile
