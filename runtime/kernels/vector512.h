// AVX512-VNNI: vpdpbusd multiplies 64 codes (unsigned) by 64 activations (signed) and adds fours of them to 16 sums.
//
// One source for two instruction sets, which differ in how codebooks are looked up (`look_up`): avx512vnni.cpp has shuffles
// of 16 bytes, avx512vbmi.cpp permutations of 64 and 128.
//
// A tile is up to 6 int8 rows by 64 columns: 24 registers of sums, 4 of codes, one of activations, one mask of nibbles, one
// table of levels where codes are looked up. The float results stay in `out` (first-level cache) and take one product a group.
// Included by files of one instruction set each. Everything is in an unnamed namespace, so that no copy of a function is
// offered to the linker for files of another one.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre")  // it hoists loads over the whole loop of groups, and the 24 sums spill
#endif

#include <cpuid.h>
#include <immintrin.h>

#include "tiles.h"

namespace qcompile {
namespace {

constexpr int kRows = 6;
constexpr int kPairRows = 4;            // of a tile of pairs that are looked up as they are multiplied: tables take registers
constexpr int kVectors = kPanel / 16;   // of sums, and of codes in a block

// Whether prefetching a panel from memory pays. It did on Zen 5, 4 KB ahead. On Zen 4 whatever was tried (first level,
// second level, non-temporal; 1 to 8 KB ahead; all lines or every fourth) took up to 20 % longer than nothing.
constexpr int kAhead = 4096;
bool fetching_pays = false;

bool is_zen5() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && ((a >> 8) & 15) + ((a >> 20) & 255) == 0x1A && __builtin_cpu_is("amd");
}

// What both of the instruction sets have.
bool has_vnni() {
  fetching_pays = is_zen5();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma");
}

// ---- activations ----

inline __mmask16 first(int64_t count) { return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (count > 0 ? count : 0)) - 1); }

// The largest |x| by its bits, whose order puts NaN above infinity above every number.
inline float largest(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i best = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(count - i), x + i));
    best = _mm512_max_epu32(best, _mm512_and_si512(bits, magnitude));
  }
  return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(int(_mm512_reduce_max_epu32(best)))));
}

// 16 int8 codes of one row, as four dwords `rows` dwords apart; only `dwords` of them.
inline void scatter(__m128i codes, int32_t* out, int rows, int64_t dwords) {
  if (rows == 1 && dwords >= 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), codes);
    return;
  }
  out[0] = _mm_extract_epi32(codes, 0);
  out[rows] = _mm_extract_epi32(codes, 1);
  if (dwords < 4) return;
  out[2 * rows] = _mm_extract_epi32(codes, 2);
  out[3 * rows] = _mm_extract_epi32(codes, 3);
}

template <bool kWide>
inline void quantize_group(const float* x, int64_t filled, int64_t depth, float inverse, int rows, int8_t* codes,
                           int32_t* sum, int32_t* low_sum) {
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512i high_sums = _mm512_setzero_si512(), low_sums = _mm512_setzero_si512();
  int32_t* out = reinterpret_cast<int32_t*>(codes);
  for (int64_t i = 0; i < depth; i += 16, out += 4 * rows) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first(filled - i), x + i), factor));
    if (kWide) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
      high_sums = _mm512_add_epi32(high_sums, high);
      low_sums = _mm512_add_epi32(low_sums, low);
      scatter(_mm512_cvtepi32_epi8(high), out, rows, (depth - i) / 4);
      scatter(_mm512_cvtepi32_epi8(low), out + 1, rows, (depth - i) / 4);
    } else {
      high_sums = _mm512_add_epi32(high_sums, q);
      scatter(_mm512_cvtepi32_epi8(q), out, rows, (depth - i) / 4);
    }
  }
  *sum = _mm512_reduce_add_epi32(high_sums);
  if (kWide) *low_sum = _mm512_reduce_add_epi32(low_sums);
}

// ---- products ----

// Sums start from minus the zero point's share, so that the codes can stay unsigned.
template <int kTileRows, int kFormat>
inline void start(const Layout& layout, const uint8_t* zero_points, const int32_t* sum, int64_t groups,
                  __m512i (&sums)[kTileRows][kVectors]) {
  if (!layout.zero_points) {
    constexpr int shift = log2_of(kFormats[kFormat].middle);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i value = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_set1_epi32(sum[r * groups]), shift));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] = value;
    }
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __m512i zero_point = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points + 16 * j)));
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {  // |sum| <= 128 * 128 fits the 16 bits that vpdpwssd multiplies
      sums[r][j] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero_point, _mm512_set1_epi32(-sum[r * groups]));
    }
  }
}

// sums += 16 columns x 4 rows of codes in each of `vectors`, times four activations of every row. In assembly, because
// compilers broadcast the activations to a register of their own, and 24 sums leave none to spare: they spill.
template <int kTileRows>
inline void accumulate(const __m512i (&vectors)[kVectors], const int32_t* activations, __m512i (&sums)[kTileRows][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[r][j]) : "v"(vectors[j]), "m"(activations[r]));
    }
  }
}

// The integers that products multiply, of vectors that hold a code a byte.
template <int kFormat>
inline void look_up(__m512i (&codes)[kVectors]) {
  if constexpr (kFormats[kFormat].affine) return;
  static constexpr Levels kLevelsOf = levels_of(kFormats[kFormat]);
  const __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevelsOf.of)));
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) codes[j] = _mm512_shuffle_epi8(levels, codes[j]);
}

template <int kTileRows, int kFormat>
inline void multiply_block(const uint8_t* block, const int32_t* activations, __m512i (&sums)[kTileRows][kVectors]) {
  __m512i loaded[kVectors], codes[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) loaded[j] = _mm512_load_si512(block + kVector * j);
  if (kFormats[kFormat].bits == 8) {
    accumulate<kTileRows>(loaded, activations, sums);
    return;
  }
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) codes[j] = _mm512_and_si512(loaded[j], nibble);
  look_up<kFormat>(codes);
  accumulate<kTileRows>(codes, activations, sums);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    if (kTileRows > 4) loaded[j] = _mm512_load_si512(block + kVector * j);  // again: cheaper than four registers kept
    codes[j] = _mm512_and_si512(_mm512_srli_epi16(loaded[j], 4), nibble);
  }
  look_up<kFormat>(codes);
  accumulate<kTileRows>(codes, activations + kTileRows, sums);
}

// v shifted to the left, or to the right where the number of bits is negative.
template <int kBitsLeft>
inline __m512i shifted(__m512i v) {
  if constexpr (kBitsLeft > 0) return _mm512_slli_epi32(v, kBitsLeft);
  if constexpr (kBitsLeft < 0) return _mm512_srli_epi32(v, -kBitsLeft);
  return v;
}

// (a & mask) | b
inline __m512i masked_or(__m512i a, __m512i mask, __m512i b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xEA); }

// Rows 8 kEight … 8 kEight + 7 of 16 columns: the low and the high four, of vectors of both fields.
template <int kFormat, int kEight>
inline void take_eight(const uint8_t* part, __m512i& first, __m512i& second) {
  constexpr int low = kFormats[kFormat].low(), high = kFormats[kFormat].high();
  const __m512i above = _mm512_load_si512(part);
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i own = _mm512_load_si512(part + (kEight * low / 4 + (high > 0)) * kVector);
  if constexpr (low == 2) {
    constexpr int at = 2 * (kEight % 2);
    const __m512i two = _mm512_set1_epi8(0x33), one = _mm512_set1_epi8(0x44);
    __m512i codes = _mm512_and_si512(shifted<-at>(own), two);
    if constexpr (high > 0) {
      codes = masked_or(shifted<low - kEight>(above), one, codes);
    }
    first = _mm512_and_si512(codes, nibble);
    second = _mm512_and_si512(_mm512_srli_epi32(codes, 4), nibble);
  } else {
    const __m512i top = _mm512_set1_epi8(high == 1 ? 0x10 : 0x30);
    first = masked_or(own, nibble, _mm512_and_si512(shifted<low - high * kEight>(above), top));
    second = masked_or(shifted<-4>(own), nibble, _mm512_and_si512(shifted<low - high * kEight - 4>(above), top));
  }
}

// Fetches part kPart of kParts of a unit that is to come: all of a large one at once is more than a core waits for.
template <int kFormat, int kPart, int kParts>
inline void fetch_part(const uint8_t* unit) {
  constexpr Format format = kFormats[kFormat];
  constexpr int lines = format.unit_bytes() / kVector;
  constexpr int ahead = kAhead + (format.in_fields() ? 2 * format.unit_bytes() : 0);  // its vectors are not read in their order
#pragma GCC unroll 8
  for (int i = lines * kPart / kParts; i < lines * (kPart + 1) / kParts; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(unit + ahead + kVector * i), _MM_HINT_T0);
  }
}

// Rows 8 kEight … of a unit of codes in fields of bits, column by column: sums wait for one another less than row by row.
template <int kTileRows, int kFormat, int kEight = 0>
inline void multiply_fields(const uint8_t* unit, bool fetch, const int32_t* activations, __m512i (&sums)[kTileRows][kVectors]) {
  constexpr Format format = kFormats[kFormat];
  if constexpr (8 * kEight < format.unit_codes()) {
    if (fetch) fetch_part<kFormat, kEight, format.unit_codes() / 8>(unit);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      __m512i first, second;
      take_eight<kFormat, kEight>(unit + j * format.unit_bytes() / 4, first, second);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const int32_t *low = activations + 2 * kEight * kTileRows + r, *high = low + kTileRows;
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[r][j]) : "v"(first), "m"(*low));
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[r][j]) : "v"(second), "m"(*high));
      }
    }
    multiply_fields<kTileRows, kFormat, kEight + 1>(unit, fetch, activations, sums);
  }
}

// Four rows of pairs, and those behind them, times activations of first numbers and of second ones.
template <int kTileRows, int kFormat, int kFour = 0>
inline void multiply_pairs(const uint8_t* unit, bool fetch, const int32_t* activations, __m512i (&sums)[kTileRows][kVectors]) {
  constexpr Format format = kFormats[kFormat];
  if constexpr (4 * kFour < format.unit_codes()) {
    if (fetch) fetch_part<kFormat, kFour, format.unit_codes() / 4>(unit);
    static constexpr auto kLevelsOf = pair_levels<format.pairs>();
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const FieldWords codes = codes_of<format.bits>(unit + j * format.unit_bytes() / 4, kFour / 2, kFour % 2);
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const __m512i levels = (__m512i)look_up<format.pairs>(kLevelsOf.of[row], codes);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
          const int32_t* own = activations + (2 * kFour + row) * kTileRows + r;
          __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[r][j]) : "v"(levels), "m"(*own));
        }
      }
    }
    multiply_pairs<kTileRows, kFormat, kFour + 1>(unit, fetch, activations, sums);
  }
}

inline __m512 load_scale(const Layout& layout, const uint8_t* group, int j) {
  if (layout.half_scales) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 32 * j)));
  return _mm512_loadu_ps(group + 64 * j);
}

// out += sums * scale of the column * scale of the row, for one group.
template <int kTileRows, bool kWide>
inline void finish(const Layout& layout, const uint8_t* scales, const float* row_scale, int64_t groups,
                   const __m512i (&sums)[kTileRows][kVectors], float* out) {
  constexpr int step = kWide ? 2 : 1;
  __m512 scale[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) scale[j] = load_scale(layout, scales, j);
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows / step; ++r) {
    const __m512 of_row = _mm512_set1_ps(row_scale[r * groups]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      __m512i total = sums[r * step][j];
      if (kWide) total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sums[r * step + step - 1][j]);
      float* y = out + r * kPanel + 16 * j;
      _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), scale[j]), of_row, _mm512_loadu_ps(y)));
    }
    __asm__ volatile("" ::: "memory");  // row by row: loading all rows' results ahead would spill the sums
  }
}

template <int kTileRows, int kFormat, bool kWide>
void multiply_tile(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  constexpr int step = kWide ? 2 : 1, model_rows = kTileRows / step;
  constexpr int unit_rows = kFormats[kFormat].unit_rows(), unit_bytes = kFormats[kFormat].unit_bytes();
  const bool fetch = tile.cold && fetching_pays;
  const int64_t groups = layout.groups(), head = layout.scale_bytes() + layout.zero_point_bytes();
  const int32_t* activations = reinterpret_cast<const int32_t*>(tile.codes);
#pragma GCC unroll 6
  for (int r = 0; r < model_rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(out + r * kPanel + 16 * j, _mm512_setzero_ps());
  }
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* scales = panel;
    __m512i sums[kTileRows][kVectors];
    start<kTileRows, kFormat>(layout, panel + layout.scale_bytes(), tile.sum + group, groups, sums);
    panel += head;
    const int64_t depth = layout.depth(group);
    for (int64_t row = 0; row < depth; row += unit_rows, panel += unit_bytes) {
      if constexpr (kFormats[kFormat].pairs > 0) {
        multiply_pairs<kTileRows, kFormat>(panel, fetch, activations, sums);
      } else if constexpr (kFormats[kFormat].in_fields()) {
        multiply_fields<kTileRows, kFormat>(panel, fetch, activations, sums);
      } else {
        if (fetch) fetch_part<kFormat, 0, 1>(panel);
        multiply_block<kTileRows, kFormat>(panel, activations, sums);
      }
      activations += unit_rows / 4 * kTileRows;
    }
    finish<kTileRows, kWide>(layout, scales, tile.scale + group, groups, sums, out);
  }
}

// Codes in fields of bits are taken out in registers.
template <int... kFormat>
constexpr Products own_products(std::integer_sequence<int, kFormat...>) {
  return {{Product{multiply_rows<kRows, kFormat>, kRows, kFormats[kFormat].pairs ? kPairRows : kRows}...}};
}
constexpr Products kOwnProducts = own_products(std::make_integer_sequence<int, kFormatCount>());

// ---- fp16 ----

void from_half(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x + i)));
  }
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    const __m256i half = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(y + i, mask, half);
  }
}

// ---- attention ----

struct AttentionSet {
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
  static constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;
  static constexpr auto from_half = qcompile::from_half;

  static Vector wide(const uint16_t* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static Vector wide(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }

  // In each quarter, the sums of that quarter of four vectors.
  static Vector four(const Vector (&x)[4]) {
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }

  // The quarters of each of four vectors added up, one behind the other.
  static Vector join(const Vector (&x)[4]) {
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    return halves(halves(x[0], x[1]), halves(x[2], x[3]));
  }

  static void turn(const float* x, int64_t stride, float* y, int64_t y_stride) {
    __m512 rows[16], pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(x + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // rows[i]: in each quarter, four rows' numbers of one column
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + 2 + j]);
        rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    // The quarters of four vectors, turned.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 low = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x44), high = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xEE);
      const __m512 low2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x44);
      const __m512 high2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xEE);
      _mm512_storeu_ps(y + i * y_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
      _mm512_storeu_ps(y + (i + 4) * y_stride, _mm512_shuffle_f32x4(low, low2, 0xDD));
      _mm512_storeu_ps(y + (i + 8) * y_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
      _mm512_storeu_ps(y + (i + 12) * y_stride, _mm512_shuffle_f32x4(high, high2, 0xDD));
    }
  }
};

}  // namespace
}  // namespace qcompile
