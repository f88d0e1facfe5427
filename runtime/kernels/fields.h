// Codes in fields of bits (layout.h) brought into the blocks of Int4 or Int8, whose products multiply them then.
//
// Plain C++ on words of 32 bits, which each instruction set compiles to its own vectors: four bytes of a column at once.
// In an unnamed namespace, so that no copy of a function is offered to the linker for files of another set.
#pragma once

#include <cstring>

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

// Some of the 16 columns of one part of a unit. kMore: `more` is added to the code in every byte (of Int4: in both halves of it).
template <int kBits, bool kMore>
QCOMPILE_INLINE void expand_columns(const uint8_t* in, uint32_t more, uint8_t* out) {
  constexpr Format format{"", kBits, 0, true, false, {}};
  constexpr int low = format.low(), high = format.high(), blocks = format.unit_rows() / 8;
  FieldWords above{};
  if constexpr (high > 0) above = words_at(in);
#pragma GCC unroll 4
  for (int q = 0; q < blocks; ++q) {  // 8 rows
    const FieldWords own = words_at(in + (q * low / 4 + (high > 0)) * kVector);
    if constexpr (kBits < 4) {  // a block of nibbles
      FieldWords codes = (own >> (low * (q % (4 / low)))) & 0x33333333u;
      if constexpr (high > 0) codes |= (q < low ? above << (low - q) : above >> (q - low)) & (0x11111111u << low);
      words_at(out + q * kBlockBytes) = kMore ? codes + more : codes;
    } else {  // two blocks of bytes
      constexpr uint32_t mask = (((1u << high) - 1) << low) * 0x01010101u;
      const int at[2] = {low - high * q, low - high * q - 4};  // to the left; to the right where below 0
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const FieldWords top = (at[h] >= 0 ? above << (at[h] >= 0 ? at[h] : 0) : above >> (at[h] < 0 ? -at[h] : 0)) & mask;
        const FieldWords codes = ((h ? own >> 4 : own) & 0x0F0F0F0Fu) | top;
        words_at(out + (2 * q + h) * kBlockBytes) = kMore ? codes + more : codes;
      }
    }
  }
}

template <int kBits>
inline void expand_units(const uint8_t* codes, int64_t units, bool cold, uint32_t more, uint8_t* blocks) {
  constexpr Format format{"", kBits, 0, true, false, {}};
  constexpr int bytes = format.unit_bytes(), made = format.unit_rows() * (kBits < 4 ? 32 : 64);
  for (int64_t i = 0; i < units; ++i, codes += bytes, blocks += made) {
    if (cold) {
      for (int64_t at = 0; at < bytes; at += kVector) __builtin_prefetch(codes + kFieldsAhead + at);
    }
    for (int part = 0; part < 4; ++part) {
      for (int at = 0; at < kVector; at += kFieldBytes) {
        const uint8_t* in = codes + part * bytes / 4 + at;
        uint8_t* out = blocks + part * kVector + at;
        if (more) {
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
  switch (own.bits) {
    case 2: return expand_units<2>(codes, units, cold, more, blocks);
    case 3: return expand_units<3>(codes, units, cold, more, blocks);
    case 5: return expand_units<5>(codes, units, cold, more, blocks);
    default: return expand_units<6>(codes, units, cold, more, blocks);
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
