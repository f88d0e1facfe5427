// AVX2: no instruction adds four products of bytes, and vpmaddubsw, which adds two, saturates at 16 bits. Therefore:
//
// 4 bits: two products of a code (0 … 15) and an activation (-128 … 127) are at most 3840, and 8 such pairs fit 16
//         bits: the 4 blocks (32 rows k) of a run are added up in 16 bits, then vpmaddwd widens them.
// 8 bits: pairs of codes (0 … 255) do not fit. Codes and activations are taken apart into even and odd rows k of 16
//         bits, the codes in registers, the activations once a group in memory, and vpmaddwd multiplies them exactly.
//
// A tile is up to 4 int8 rows. Its panel is walked once with 1 row, in two halves with 2, in quarters with 3 and 4:
// with 8 registers of sums, 16 suffice for codes, activations and constants.

#include <cpuid.h>

#include "vector256.h"

namespace qcompile {
namespace {

constexpr int kTileRows = 4;
constexpr int kRunBlocks = 4;   // blocks that 16 bits hold: 2 pairs each, 8 * 3840 = 30720

bool available() {
  unsigned a, b, c = 0, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

template <int kRows>
constexpr int columns_at_once() { return kRows == 1 ? 8 : kRows == 2 ? 4 : 2; }

// sums += one block's codes of 8 rows k times the activations, in 16 bits.
template <int kRows, int kCount>
inline void add_block4(const uint8_t* block, const int8_t* activations, __m256i (&sums)[kRows][kCount]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  if (kCount > 2) {  // few rows: their activations stay in registers
    __m256i low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      low[r] = broadcast(activations + 4 * r);
      high[r] = broadcast(activations + 4 * (kRows + r));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      const __m256i codes = load(block + 32 * j);
      const __m256i first = _mm256_and_si256(codes, nibble);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][j] = _mm256_add_epi16(sums[r][j], _mm256_maddubs_epi16(first, low[r]));
        sums[r][j] = _mm256_add_epi16(sums[r][j], _mm256_maddubs_epi16(second, high[r]));
      }
    }
    return;
  }
  __m256i first[kCount], second[kCount];  // more rows: the codes do
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) {
    const __m256i codes = load(block + 32 * j);
    first[j] = _mm256_and_si256(codes, nibble);
    second[j] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m256i low = broadcast(activations + 4 * r), high = broadcast(activations + 4 * (kRows + r));
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      sums[r][j] = _mm256_add_epi16(sums[r][j], _mm256_maddubs_epi16(first[j], low));
      sums[r][j] = _mm256_add_epi16(sums[r][j], _mm256_maddubs_epi16(second[j], high));
    }
  }
}

template <int kRows, int kCount>
inline void dot4(const uint8_t* blocks, int64_t count, const uint8_t* ahead, const int8_t* activations,
                 __m256i (&sums)[kRows][kCount]) {
  while (count > 0) {
    __m256i narrow[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) narrow[r][j] = _mm256_setzero_si256();
    }
    const int64_t run = count < kRunBlocks ? count : kRunBlocks;
    for (int64_t i = 0; i < run; ++i, blocks += kBlockBytes, activations += 8 * kRows) {
      if (ahead) fetch<kCount>(ahead);
      add_block4<kRows, kCount>(blocks, activations, narrow);
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
  alignas(32) int32_t even[kMaxDepth / 4 * kTileRows];
  alignas(32) int32_t odd[kMaxDepth / 4 * kTileRows];
};

inline void split_pairs(const int8_t* activations, int64_t dwords, Pairs& pairs) {
  for (int64_t i = 0; i < dwords; i += 2) {  // the depth is a multiple of 8: dwords come in pairs
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(activations + 4 * i));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pairs.even + i), _mm_srai_epi16(_mm_slli_epi16(codes, 8), 8));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pairs.odd + i), _mm_srai_epi16(codes, 8));
  }
}

template <int kRows, int kCount>
inline void dot8(const uint8_t* blocks, int64_t count, const uint8_t* ahead, const Pairs& pairs,
                 __m256i (&sums)[kRows][kCount]) {
  const int32_t *even = pairs.even, *odd = pairs.odd;
  for (int64_t i = 0; i < count; ++i, blocks += kBlockBytes, even += kRows, odd += kRows) {
    if (ahead) fetch<kCount>(ahead);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      const __m256i codes = load(blocks + 32 * j);
      const __m256i first = _mm256_and_si256(codes, _mm256_set1_epi16(255)), second = _mm256_srli_epi16(codes, 8);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(first, _mm256_set1_epi32(even[r])),
                                                  _mm256_madd_epi16(second, _mm256_set1_epi32(odd[r])));
        sums[r][j] = _mm256_add_epi32(sums[r][j], products);
      }
    }
  }
}

template <int kRows, int kBits, bool kWide>
inline void multiply_group(const Layout& layout, const Group& group, float* out) {
  constexpr int count = columns_at_once<kRows>();
  Pairs pairs;
  if (kBits == 8) split_pairs(group.activations, layout.depth() / 4 * kRows, pairs);
  for (int first = 0; first < kVectors; first += count) {
    __m256i sums[kRows][count];
    start<kRows, count>(layout, group, first, sums);
    const uint8_t* ahead = group.cold ? fetch_from(layout, group, first) : nullptr;
    if (kBits == 4) {
      dot4<kRows, count>(group.blocks + 32 * first, layout.blocks(), ahead, group.activations, sums);
    } else {
      dot8<kRows, count>(group.blocks + 32 * first, layout.blocks(), ahead, pairs, sums);
    }
    finish<kRows, count, kWide>(layout, group, first, sums, out);
  }
}

template <int kBits>
void multiply_bits(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  switch (tile.rows + (tile.wide ? 100 : 0)) {
    case 1: return multiply_tile<1, kBits, false>(layout, panel, tile, out);
    case 2: return multiply_tile<2, kBits, false>(layout, panel, tile, out);
    case 3: return multiply_tile<3, kBits, false>(layout, panel, tile, out);
    case 4: return multiply_tile<4, kBits, false>(layout, panel, tile, out);
    case 102: return multiply_tile<2, kBits, true>(layout, panel, tile, out);
    case 104: return multiply_tile<4, kBits, true>(layout, panel, tile, out);
  }
}

void multiply(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  layout.bits == 4 ? multiply_bits<4>(layout, panel, tile, out) : multiply_bits<8>(layout, panel, tile, out);
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", available, kTileRows, quantize, multiply, from_half, to_half};

}  // namespace qcompile
