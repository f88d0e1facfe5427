// Codes in fields of bits (layout.h) brought into the blocks of Int4 or Int8, whose products multiply them then.
//
// Plain C++ on words of 32 bits, which each instruction set compiles to its own vectors: four bytes of a column at once.
// In an unnamed namespace, so that no copy of a function is offered to the linker for files of another set.
#pragma once

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "layout.h"

namespace qcompile {
namespace {

#if defined(__AVX512BW__)
constexpr int kFieldBytes = 64;
#elif defined(__AVX2__)
constexpr int kFieldBytes = 32;
#else
constexpr int kFieldBytes = 16;
#endif
constexpr int64_t kFieldsAhead = 4096;  // bytes of prefetch

// Words of 32 bits, each the four bytes of a column. Shifts bring bits of a neighbouring byte where the mask takes them off.
typedef uint32_t FieldWords __attribute__((vector_size(kFieldBytes), aligned(4), may_alias));

inline const FieldWords& words_at(const uint8_t* bytes) { return *reinterpret_cast<const FieldWords*>(bytes); }
inline FieldWords& words_at(uint8_t* bytes) { return *reinterpret_cast<FieldWords*>(bytes); }

// The bits that one field has, from bit kBelow of the codes on, of rows 8 eight + 4 half … + 3 of some columns of a unit.
template <int kBits, int kBelow>
QCOMPILE_INLINE FieldWords field_of(const uint8_t* part, int eight, int half) {
  constexpr Format format{"", kBits, 0, true, Stored::kNumbers, {}};
  constexpr int width = Format::widest_field(kBits - kBelow), narrower = (kBits - kBelow - width) * format.unit_codes() / 32;
  const FieldWords own = words_at(part + (narrower + eight * width / 4) * kVector);
  const int at = kBelow - width * (eight % (4 / width)) - 4 * half;  // to the left; to the right where below 0
  return (at >= 0 ? own << (at >= 0 ? at : 0) : own >> (at < 0 ? -at : 0)) & (((1u << width) - 1) << kBelow) * 0x01010101u;
}

// Those codes, a byte each. Of 8 bits a unit has four rows.
template <int kBits>
QCOMPILE_INLINE FieldWords codes_of(const uint8_t* part, int eight, int half) {
  if constexpr (kBits == 8) {
    return words_at(part);
  } else {
    constexpr int low = Format::widest_field(kBits), two = Format::widest_field(kBits - low);
    FieldWords codes = field_of<kBits, 0>(part, eight, half);
    if constexpr (low < kBits) codes |= field_of<kBits, low>(part, eight, half);
    if constexpr (low < kBits && low + two < kBits) codes |= field_of<kBits, low + two>(part, eight, half);
    return codes;
  }
}

// ---- codebooks ----

// Of kSize bytes at `table`, those that the codes say.
#if defined(__AVX512VBMI__)
template <int kSize>
QCOMPILE_INLINE FieldWords look_up(const uint8_t* table, FieldWords codes) {
  const __m512i own = (__m512i)codes, first = _mm512_load_si512(table);
  if constexpr (kSize <= 64) return (FieldWords)_mm512_permutexvar_epi8(own, first);
  const __m512i low = _mm512_permutex2var_epi8(first, own, _mm512_load_si512(table + 64));
  if constexpr (kSize == 128) return (FieldWords)low;
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), own, _mm512_load_si512(table + 192));
  return (FieldWords)_mm512_mask_blend_epi8(_mm512_movepi8_mask(own), low, high);
}
#elif defined(__AVX2__)
// Sixteen are what a shuffle looks up: of two halves, the code's highest bit says which has it.
template <int kSize>
QCOMPILE_INLINE FieldWords look_up(const uint8_t* table, FieldWords codes) {
  if constexpr (kSize == 16) {
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
#if defined(__AVX512BW__)
    return (FieldWords)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), (__m512i)(codes & 0x0F0F0F0Fu));
#else
    return (FieldWords)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), (__m256i)(codes & 0x0F0F0F0Fu));
#endif
  } else {
    const FieldWords highest = codes << (8 - log2_of(kSize));
    const FieldWords low = look_up<kSize / 2>(table, codes), high = look_up<kSize / 2>(table + kSize / 2, codes);
#if defined(__AVX512BW__)
    return (FieldWords)_mm512_mask_blend_epi8(_mm512_movepi8_mask((__m512i)highest), (__m512i)low, (__m512i)high);
#else
    return (FieldWords)_mm256_blendv_epi8((__m256i)low, (__m256i)high, (__m256i)highest);
#endif
  }
}
#elif defined(__ARM_NEON)
template <int kSize>
QCOMPILE_INLINE FieldWords look_up(const uint8_t* table, FieldWords codes) {
  uint8x16_t own = (uint8x16_t)codes;
  if constexpr (kSize == 16) return (FieldWords)vqtbl1q_u8(vld1q_u8(table), own);
  if constexpr (kSize == 32) return (FieldWords)vqtbl2q_u8(vld1q_u8_x2(table), own);
  uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table), own);
#pragma GCC unroll 4
  for (int i = 64; i < kSize; i += 64) {  // what lies outside of a table stays
    own = vsubq_u8(own, vdupq_n_u8(64));
    found = vqtbx4q_u8(found, vld1q_u8_x4(table + i), own);
  }
  return (FieldWords)found;
}
#endif

// Some of the 16 columns of one part of a unit. kMore: `more` is added to the code in every byte (of Int4: in both halves of it).
template <int kBits, bool kMore>
QCOMPILE_INLINE void expand_columns(const uint8_t* in, uint32_t more, uint8_t* __restrict__ out) {
  constexpr Format format{"", kBits, 0, true, Stored::kNumbers, {}};
  constexpr int low = format.low(), high = format.high(), blocks = format.unit_rows() / 8;
#pragma GCC unroll 4
  for (int q = 0; q < blocks; ++q) {  // 8 rows
    if constexpr (kBits < 4) {  // a block of nibbles
      const FieldWords own = words_at(in + (q * low / 4 + (high > 0)) * kVector), above = words_at(in);
      FieldWords codes = (own >> (low * (q % (4 / low)))) & 0x33333333u;
      if constexpr (high > 0) codes |= (q < low ? above << (low - q) : above >> (q - low)) & (0x11111111u << low);
      words_at(out + q * kBlockBytes) = kMore ? codes + more : codes;
    } else {  // two blocks of bytes
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const FieldWords codes = codes_of<kBits>(in, q, h);
        words_at(out + (2 * q + h) * kBlockBytes) = kMore ? codes + more : codes;
      }
    }
  }
}

// The same of pairs: of each four rows of codes a block of first numbers, and one of second ones.
template <int kBits>
QCOMPILE_INLINE void expand_pairs(const uint8_t* in, uint8_t* __restrict__ out) {
  static constexpr PairLevels<1 << kBits> kLevelsOf = pair_levels<1 << kBits>();
  constexpr int fours = Format{"", kBits, 0, true, Stored::kNumbers, {}, 1 << kBits}.unit_codes() / 4;
#pragma GCC unroll 8
  for (int i = 0; i < fours; ++i) {
    const FieldWords codes = codes_of<kBits>(in, i / 2, i % 2);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) words_at(out + (2 * i + row) * kBlockBytes) = look_up<1 << kBits>(kLevelsOf.of[row], codes);
  }
}

template <int kBits, bool kPairs>
inline void expand_units(const uint8_t* codes, int64_t units, bool cold, uint32_t more, uint8_t* blocks) {
  constexpr Format format{"", kBits, 0, true, Stored::kNumbers, {}, kPairs ? 1 << kBits : 0};
  constexpr int bytes = format.unit_bytes(), made = format.unit_rows() * kPanel * kFormats[format.base()].bits / 8;
  for (int64_t i = 0; i < units; ++i, codes += bytes, blocks += made) {
    if (cold) {
      for (int64_t at = 0; at < bytes; at += kVector) __builtin_prefetch(codes + kFieldsAhead + at);
    }
    for (int part = 0; part < 4; ++part) {
      for (int at = 0; at < kVector; at += kFieldBytes) {
        const uint8_t* in = codes + part * bytes / 4 + at;
        uint8_t* out = blocks + part * kVector + at;
        if constexpr (kPairs) {
          expand_pairs<kBits>(in, out);
        } else if (more) {
          expand_columns<kBits, true>(in, more, out);
        } else {
          expand_columns<kBits, false>(in, 0, out);
        }
      }
    }
  }
}

// The codes of one group of `depth` rows -> blocks of the base, kMaxDepth * kPanel bytes at most. Without zero points, what
// stands for 0 becomes what stands for 0 in the base.
[[gnu::noinline]] void expand_group(const Layout& layout, const uint8_t* codes, int64_t depth, bool cold, uint8_t* blocks) {
  const Format &own = layout.of(), &base = kFormats[own.base()];
  const uint32_t each = own.bits < 4 ? 0x11111111u : 0x01010101u;
  const uint32_t more = layout.zero_points ? 0 : each * uint32_t(base.middle - own.middle);
  const int64_t units = layout.units(depth);
  switch (own.bits + (own.pairs ? 16 : 0)) {
    case 2: return expand_units<2, false>(codes, units, cold, more, blocks);
    case 3: return expand_units<3, false>(codes, units, cold, more, blocks);
    case 5: return expand_units<5, false>(codes, units, cold, more, blocks);
    case 6: return expand_units<6, false>(codes, units, cold, more, blocks);
    case 16 + 4: return expand_units<4, true>(codes, units, cold, 0, blocks);
    case 16 + 5: return expand_units<5, true>(codes, units, cold, 0, blocks);
    case 16 + 6: return expand_units<6, true>(codes, units, cold, 0, blocks);
    case 16 + 7: return expand_units<7, true>(codes, units, cold, 0, blocks);
    default: return expand_units<8, true>(codes, units, cold, 0, blocks);
  }
}

// A panel -> the same in the layout of the base (layout.expanded()).
void expand(const Layout& layout, const Layout& expanded, const uint8_t* panel, uint8_t* out) {
  const int64_t head = layout.scale_bytes() + layout.zero_point_bytes();
  for (int64_t g = 0; g < layout.groups(); ++g, panel += layout.group_bytes(), out += expanded.group_bytes()) {
    std::memcpy(out, panel, size_t(head));
    expand_group(layout, panel + head, layout.depth(g), true, out + head);
  }
}

}  // namespace
}  // namespace qcompile
