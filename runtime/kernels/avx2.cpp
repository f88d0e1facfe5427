// AVX2: no instruction adds four products of bytes, and vpmaddubsw, which adds two, saturates at 16 bits. Therefore a
// format's largest integer says how its products are added up:
//
// in 16 bits: two products of an integer 0 … 15 and an activation (-128 … 127) are at most 3840, and 8 such pairs fit: the
//             4 blocks (32 rows k) of a run are added up in 16 bits, then vpmaddwd widens them. Of integers to 28, 2 blocks.
// one pair:   signed levels of a table (-127 … 127) take the sign of their activation and meet its magnitude: one pair, 32512
//             at most, is all that 16 bits hold, and vpmaddwd widens it.
// in 32 bits: codes 0 … 255 do not fit. They and the activations are taken apart into even and odd rows k of 16 bits, the
//             codes in registers, the activations once a group in memory, and vpmaddwd multiplies them exactly.
//
// A tile is up to 4 int8 rows, of looked-up levels up to 32, which avx2_many.h multiplies from 5 on. Here a panel is walked
// once with 1 row, in two halves with 2, in quarters with 3 and 4: with 8 registers of sums, 16 suffice for codes,
// activations and constants.

#include <cpuid.h>

#include <type_traits>

#include "avx2_many.h"

namespace qcompile {
namespace {

constexpr int kTileRows = 4;

// Blocks of a format whose products 16 bits hold: a block adds 4 to each sum. 0: not one.
constexpr int run_blocks(int format) { return 32767 / (4 * 128 * kFormats[format].largest()); }

// What is taken off the integers of a table whose products are added up pair by pair.
constexpr int less_of(int format) { return kFormats[format].affine || run_blocks(format) ? 0 : kFormats[format].middle; }

bool available() {
  unsigned a, b, c = 0, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

template <int kRows>
constexpr int columns_at_once() { return kRows == 1 ? 8 : kRows == 2 ? 4 : 2; }

// The integers of a vector as the two operands that the multiplications of this width take: nibbles, or even and odd rows.
template <int kFormat>
inline __m256i first_operand(__m256i codes) {
  if constexpr (run_blocks(kFormat) > 0) return integers<kFormat, 0>(codes);
  return _mm256_and_si256(codes, _mm256_set1_epi16(255));
}

template <int kFormat>
inline __m256i second_operand(__m256i codes) {
  if constexpr (run_blocks(kFormat) > 0) return integers<kFormat, 1>(codes);
  return _mm256_srli_epi16(codes, 8);
}

// sums + integers * activations: pairs of products in 16 bits, or in 32
template <int kFormat>
inline __m256i multiply_add(__m256i sums, __m256i integers, __m256i activations) {
  if (run_blocks(kFormat) > 0) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(integers, activations));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(integers, activations));
}

// sums += one block's integers times the activations, of which `low` meet the first operand and `high` the second.
template <int kRows, int kFormat, int kCount>
inline void add_block(const uint8_t* block, const int8_t* low, const int8_t* high, __m256i (&sums)[kRows][kCount]) {
  if constexpr (kCount > 2) {  // few rows: their activations stay in registers
    __m256i first[kRows], second[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      first[r] = broadcast(low + 4 * r);
      second[r] = broadcast(high + 4 * r);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      const __m256i codes = load(block + 32 * j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][j] = multiply_add<kFormat>(sums[r][j], first_operand<kFormat>(codes), first[r]);
        sums[r][j] = multiply_add<kFormat>(sums[r][j], second_operand<kFormat>(codes), second[r]);
      }
    }
  } else {  // more rows: the codes do
    __m256i first[kCount], second[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      first[j] = first_operand<kFormat>(load(block + 32 * j));
      second[j] = second_operand<kFormat>(load(block + 32 * j));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i low_four = broadcast(low + 4 * r), high_four = broadcast(high + 4 * r);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        sums[r][j] = multiply_add<kFormat>(sums[r][j], first[j], low_four);
        sums[r][j] = multiply_add<kFormat>(sums[r][j], second[j], high_four);
      }
    }
  }
}

template <int kRows, int kFormat, int kCount>
inline void dot16(const uint8_t* blocks, int64_t count, const uint8_t* ahead, const int8_t* activations,
                 __m256i (&sums)[kRows][kCount]) {
  while (count > 0) {
    __m256i narrow[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) narrow[r][j] = _mm256_setzero_si256();
    }
    const int64_t run = count < run_blocks(kFormat) ? count : run_blocks(kFormat);
    for (int64_t i = 0; i < run; ++i, blocks += kBlockBytes, activations += 8 * kRows) {
      if (ahead) fetch<kCount>(ahead);
      add_block<kRows, kFormat, kCount>(blocks, activations, activations + 4 * kRows, narrow);
    }
    count -= run;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(narrow[r][j], _mm256_set1_epi16(1)));
      }
    }
  }
}

// A group's activations as pairs of 16 bits: of the four of a dword, 0 and 2 in `even`, 1 and 3 in `odd`.
struct Pairs {
  alignas(32) int8_t even[kMaxDepth * kTileRows];
  alignas(32) int8_t odd[kMaxDepth * kTileRows];
};

inline void split_pairs(const int8_t* activations, int64_t bytes, Pairs& pairs) {
  for (int64_t i = 0; i < bytes; i += 8) {  // the depth is a multiple of 8
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(activations + i));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pairs.even + i), _mm_srai_epi16(_mm_slli_epi16(codes, 8), 8));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pairs.odd + i), _mm_srai_epi16(codes, 8));
  }
}

// sums += the signed levels of half `kHalf` of a block times the activations
template <int kRows, int kFormat, int kHalf, int kCount>
inline void add_signed(const uint8_t* block, const int8_t* activations, __m256i (&sums)[kRows][kCount]) {
  constexpr int less = less_of(kFormat);
  const auto add = [](__m256i sum, __m256i levels, __m256i four, __m256i magnitudes) __attribute__((always_inline)) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(levels, four));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
  if constexpr (kCount > 2) {  // few rows: their activations stay in registers
    __m256i four[kRows], magnitudes[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) magnitudes[r] = _mm256_abs_epi8(four[r] = broadcast(activations + 4 * r));
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      const __m256i levels = integers<kFormat, kHalf, less>(load(block + 32 * j));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][j] = add(sums[r][j], levels, four[r], magnitudes[r]);
    }
  } else {  // more rows: the levels do
    __m256i levels[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) levels[j] = integers<kFormat, kHalf, less>(load(block + 32 * j));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i four = broadcast(activations + 4 * r), magnitudes = _mm256_abs_epi8(four);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) sums[r][j] = add(sums[r][j], levels[j], four, magnitudes);
    }
  }
}

template <int kRows, int kFormat, int kCount>
inline void dot_pairs(const uint8_t* blocks, int64_t count, const uint8_t* ahead, const int8_t* activations,
                      __m256i (&sums)[kRows][kCount]) {
  for (int64_t i = 0; i < count; ++i, blocks += kBlockBytes, activations += 8 * kRows) {
    if (ahead) fetch<kCount>(ahead);
    add_signed<kRows, kFormat, 0, kCount>(blocks, activations, sums);
    add_signed<kRows, kFormat, 1, kCount>(blocks, activations + 4 * kRows, sums);
  }
}

template <int kRows, int kFormat, int kCount>
inline void dot32(const uint8_t* blocks, int64_t count, const uint8_t* ahead, const Pairs& pairs,
                  __m256i (&sums)[kRows][kCount]) {
  for (int64_t i = 0; i < count; ++i, blocks += kBlockBytes) {
    if (ahead) fetch<kCount>(ahead);
    add_block<kRows, kFormat, kCount>(blocks, pairs.even + 4 * kRows * i, pairs.odd + 4 * kRows * i, sums);
  }
}

template <int kRows, int kFormat, bool kWide>
inline void multiply_group(const Layout& layout, const Group& group, float* out) {
  constexpr int count = columns_at_once<kRows>();
  const int64_t blocks = group.depth / kFormats[kFormat].block_rows();
  constexpr bool one_pair = less_of(kFormat) > 0, narrow = run_blocks(kFormat) > 0;
  Pairs pairs;
  if constexpr (!one_pair && !narrow) split_pairs(group.activations, group.depth * kRows, pairs);
  for (int first = 0; first < kVectors; first += count) {
    __m256i sums[kRows][count];
    start<kRows, kFormat, count, less_of(kFormat)>(group, first, sums);
    const uint8_t* ahead = group.cold ? fetch_from(layout, group, first) : nullptr;
    if constexpr (narrow) {
      dot16<kRows, kFormat, count>(group.blocks + 32 * first, blocks, ahead, group.activations, sums);
    } else if constexpr (one_pair) {
      dot_pairs<kRows, kFormat, count>(group.blocks + 32 * first, blocks, ahead, group.activations, sums);
    } else {
      dot32<kRows, kFormat, count>(group.blocks + 32 * first, blocks, ahead, pairs, sums);
    }
    finish<kRows, count, kWide>(layout, group, first, sums, out);
  }
}

template <int kFormat>
void multiply_levels(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  using Small = SmallLevels<kFormat, run_blocks(kFormat)>;
  using Decoded = std::conditional_t<(run_blocks(kFormat) > 0), Small, LargeLevels<kFormat>>;
  if (tile.rows <= kTileRows) return multiply_rows<kTileRows, kFormat>(layout, panel, tile, out);
  const auto multiply = tile.wide ? multiply_many<true, Decoded> : multiply_many<false, Decoded>;
  multiply(layout, panel, tile, out);
}

template <int kFormat>
constexpr Product product_of() {
  if constexpr (!kFormats[kFormat].affine) return {multiply_levels<kFormat>, kMaxRows, kTileRows};
  return {multiply_rows<kTileRows, kFormat>, kTileRows, kTileRows};
}

template <int... kFormat>
constexpr Products avx2_products(std::integer_sequence<int, kFormat...>) {
  return {{product_of<multiplied_as(kFormat)>()...}};
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {
    "avx2", available, quantize, avx2_products(std::make_integer_sequence<int, kFormatCount>()), kPairs, expand,
    from_half, to_half, swiglu, hadamard, Attend<AttentionSet>::run};

}  // namespace qcompile
