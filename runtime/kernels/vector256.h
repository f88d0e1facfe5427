// What the x86 instruction sets with 256-bit registers share: quantization, start and end of a group's sums, fp16.
//
// Included by files of one instruction set each. Everything is in an unnamed namespace, so that no copy of a function
// is offered to the linker for files of another one.
#pragma once

#include <immintrin.h>

#include "tiles.h"

namespace qcompile {
namespace {

constexpr int kLanes = 8;                     // columns of a register of sums
constexpr int kVectors = kPanel / kLanes;     // of sums over a panel, and of codes in a block
constexpr int kPairs = 32;                    // of a codebook that is looked up as it is multiplied
constexpr int kAhead = 4096;                  // bytes of prefetch: what a panel is away in time from memory

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The four activations of one row, for every column.
inline __m256i broadcast(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

// ---- codes ----

// The integers that products multiply, one a byte, of half `kHalf` of a vector of a block: of codes of 4 bits 0 is the
// low nibbles and 1 the high ones, 8 bits have one half. Those of a table are less `kLess`.
template <int kFormat, int kHalf, int kLess = 0>
inline __m256i integers(__m256i codes) {
  constexpr Format format = kFormats[kFormat];
  if constexpr (format.bits == 8) return codes;
  const __m256i nibbles = _mm256_and_si256(kHalf ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
  if constexpr (format.affine) return nibbles;
  static constexpr Levels kLevelsOf = levels_of(format, kLess);
  const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(kLevelsOf.of));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles);
}

// ---- activations ----

// x[0] … x[7], zeros from x[count] on; nothing behind x[count - 1] is read.
inline __m256 load_some(const float* x, int64_t count) {
  if (count >= kLanes) return _mm256_loadu_ps(x);
  float some[kLanes] = {};  // no vmaskmovps: qemu reads all lanes of its operand
  for (int64_t i = 0; i < count; ++i) some[i] = x[i];
  return _mm256_loadu_ps(some);
}

inline __m128i fold(__m256i v, __m128i (*fold_halves)(__m128i, __m128i)) {
  __m128i half = fold_halves(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = fold_halves(half, _mm_shuffle_epi32(half, 0x4E));
  return fold_halves(half, _mm_shuffle_epi32(half, 0xB1));
}

inline __m128i larger(__m128i a, __m128i b) { return _mm_max_epi32(a, b); }
inline __m128i plus(__m128i a, __m128i b) { return _mm_add_epi32(a, b); }

// The largest |x| by its bits, whose order puts NaN above infinity above every number.
inline float largest(const float* x, int64_t count) {
  __m256i best = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m256i bits = _mm256_castps_si256(load_some(x + i, count - i));
    best = _mm256_max_epi32(best, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
  }
  return _mm_cvtss_f32(_mm_castsi128_ps(fold(best, larger)));
}

// Two dwords of a row of codes, `rows` dwords apart. `bytes` holds one in the low end of each of its halves.
inline void store_dwords(__m256i bytes, int8_t* out, int rows) {
  const int32_t first = _mm256_extract_epi32(bytes, 0), second = _mm256_extract_epi32(bytes, 4);
  __builtin_memcpy(out, &first, 4);
  __builtin_memcpy(out + 4 * rows, &second, 4);
}

template <bool kWide>
inline void quantize_group(const float* x, int64_t filled, int64_t depth, float inverse, int rows, int8_t* out,
                           int32_t* sum, int32_t* low_sum) {
  const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i high_sums = _mm256_setzero_si256(), low_sums = high_sums;
  for (int64_t i = 0; i < depth; i += kLanes, out += 8 * rows) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(load_some(x + i, filled - i), factor));  // nearest, ties to even
    if (kWide) {
      const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(128)), 8);
      const __m256i low = _mm256_sub_epi32(q, _mm256_slli_epi32(high, 8));
      high_sums = _mm256_add_epi32(high_sums, high);
      low_sums = _mm256_add_epi32(low_sums, low);
      store_dwords(_mm256_shuffle_epi8(high, low_bytes), out, rows);
      store_dwords(_mm256_shuffle_epi8(low, low_bytes), out + 4, rows);
    } else {
      high_sums = _mm256_add_epi32(high_sums, q);
      store_dwords(_mm256_shuffle_epi8(q, low_bytes), out, rows);
    }
  }
  *sum = _mm_cvtsi128_si32(fold(high_sums, plus));
  if (kWide) *low_sum = _mm_cvtsi128_si32(fold(low_sums, plus));
}

// ---- a group's sums ----

// One packed group and what of a tile meets it.
struct Group {
  const uint8_t* scale;        // (64,) fp16 or fp32
  const uint8_t* zero_point;   // (64,), or nullptr
  const uint8_t* blocks;       // of codes
  const int8_t* activations;   // (depth / 4, rows, 4)
  int64_t depth;
  const float* row_scale;      // of row 0 of the model; the next row's lie `groups` further
  const int32_t* sum;          // of int8 row 0, likewise
  int64_t groups;
  bool cold;                   // the panel comes from memory
};

// Group g of a panel, which begins at `packed`.
inline Group group_of(const Layout& layout, const uint8_t* packed, const Tile& tile, int64_t g) {
  const uint8_t* zero_point = packed + layout.scale_bytes();
  const int8_t* activations = tile.codes + g * layout.depth() * tile.rows;
  return {packed, layout.zero_points ? zero_point : nullptr, zero_point + layout.zero_point_bytes(), activations,
          layout.depth(g), tile.scale + g, tile.sum + g, layout.groups(), tile.cold};
}

// Sums of `kCount` vectors from `first` on start from minus the zero point's share, so that codes can stay unsigned,
// or less kLess.
template <int kRows, int kFormat, int kCount, int kLess = 0>
inline void start(const Group& group, int first, __m256i (&sums)[kRows][kCount]) {
  if (!group.zero_point) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i value = _mm256_set1_epi32((kLess - kFormats[kFormat].middle) * group.sum[r * group.groups]);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) sums[r][j] = value;
    }
    return;
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) {
    const auto* eight = reinterpret_cast<const __m128i*>(group.zero_point + kLanes * (first + j));
    const __m256i zero_point = _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {  // |sum| <= 128 * 128 fits the 16 bits that vpmaddwd multiplies
      sums[r][j] = _mm256_madd_epi16(zero_point, _mm256_set1_epi32(-group.sum[r * group.groups]));
    }
  }
}

inline __m256 load_scale(const Layout& layout, const Group& group, int vector) {
  if (!layout.half_scales) return _mm256_loadu_ps(reinterpret_cast<const float*>(group.scale) + kLanes * vector);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group.scale + 2 * kLanes * vector)));
}

// out += sums, high and low row put together, times the scales of the weight and of the activations.
template <int kRows, int kCount, bool kWide>
inline void finish(const Layout& layout, const Group& group, int first, const __m256i (&sums)[kRows][kCount],
                   float* out) {
  constexpr int step = kWide ? 2 : 1;
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) {
    const __m256 scale = load_scale(layout, group, first + j);
#pragma GCC unroll 8
    for (int r = 0; r < kRows / step; ++r) {
      __m256i total = sums[r * step][j];
      if (kWide) total = _mm256_add_epi32(_mm256_slli_epi32(total, 8), sums[r * step + step - 1][j]);
      const __m256 row_scale = _mm256_set1_ps(group.row_scale[r * group.groups]);
      float* y = out + r * kPanel + kLanes * (first + j);
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(total), scale);
      _mm256_storeu_ps(y, _mm256_fmadd_ps(scaled, row_scale, _mm256_loadu_ps(y)));
    }
  }
}

// A cold panel is fetched as the linear stream that it is, though each group is walked several times by columns: a walk's
// share of the fetching is `kCount` of 8 vectors a block, counted from where `fetch_from` says.
inline const uint8_t* fetch_from(const Layout& layout, const Group& group, int first) {
  return group.blocks + kAhead + layout.code_bytes(group.depth) / kVectors * first;
}

template <int kCount>
inline void fetch(const uint8_t*& from) {
#pragma GCC unroll 4
  for (int j = 0; j < kCount; j += 2) _mm_prefetch(reinterpret_cast<const char*>(from + 32 * j), _MM_HINT_T0);
  from += 32 * kCount;
}

// What each instruction set defines for itself: out (rows of the model, 64) += the product of one group.
template <int kRows, int kFormat, bool kWide>
void multiply_group(const Layout& layout, const Group& group, float* out);

template <int kRows, int kFormat, bool kWide>
void multiply_tile(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  const int64_t groups = layout.groups(), bytes = layout.group_bytes();
  alignas(64) uint8_t expanded[kMaxDepth * kPanel];
  for (int i = 0; i < kRows / (kWide ? 2 : 1) * kPanel; i += kLanes) _mm256_storeu_ps(out + i, _mm256_setzero_ps());
  for (int64_t g = 0; g < groups; ++g, panel += bytes) {
    Group group = group_of(layout, panel, tile, g);
    if (layout.in_fields()) {
      expand_group(layout, group.blocks, group.depth, tile.cold, expanded);
      group.blocks = expanded;
      group.cold = false;
    } else if (tile.cold) {  // scales and zero points lie between the codes of two groups
      const uint8_t* from = fetch_from(layout, group, kVectors);
      fetch<4>(from);
    }
    multiply_group<kRows, kFormat, kWide>(layout, group, out);
  }
}

// ---- fp16 ----

void from_half(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  for (; i < n; ++i) y[i] = _cvtsh_ss(x[i]);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
  for (; i < n; ++i) y[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

// ---- attention ----

struct AttentionSet {
  typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
  static constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
  static constexpr auto from_half = qcompile::from_half;

  static Vector wide(const uint16_t* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  static Vector wide(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }

  // In each half, the sums of that half of four vectors.
  static Vector four(const Vector (&x)[4]) {
    return _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  }

  // The halves of each of two vectors added up, one behind the other.
  static Vector join(const Vector (&x)[2]) {
    return _mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
  }

  static void turn(const float* x, int64_t stride, float* y, int64_t y_stride) {
    __m256 rows[8], pairs[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(x + i * stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // rows[i]: in each half, four rows' numbers of one column
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + 2 + j]);
        rows[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        rows[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(y + i * y_stride, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20));
      _mm256_storeu_ps(y + (i + 4) * y_stride, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace qcompile
