// The weight formats, one row each. Operators, layout, packing, checks, and the code of every instruction set follow
// from the rows; nothing else tells one format from another.
//
// A code of the file becomes an integer 0 … 255, which products multiply by int8 activations: it is the code itself,
// or the level that a table of 16 has for it. The integer that means 0, `middle`, is added to whatever is signed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codebooks.h"

// The files of single instruction sets use these functions too, and a copy compiled there that the linker took for all
// would crash other machines: no copy is made.
#define QCOMPILE_INLINE [[gnu::always_inline]] inline

namespace qcompile {

constexpr int kLevels = 16;  // of a table: a code of 4 bits, and what a shuffle of bytes looks up

// n for 2^n
QCOMPILE_INLINE constexpr int log2_of(int power) {
  int n = 0;
  while (power > 1 << n) ++n;
  return n;
}

// Scales of a file: numbers; bytes e, for 2^(e - 128); or bytes of E4M3 numbers, times 2^exponent, which an attribute says.
enum class Stored { kNumbers, kPowers, kE4M3 };

struct Format {
  const char* word;       // the end of its operators' names: MatMul…, MatMulAdd…
  int bits;               // of a code: 4 or 8; or others, in fields of bits
  int middle;             // a power of two
  bool affine;            // codes are numbers, maybe signed, with zero points or without; otherwise there is a table
  Stored scales;          // where they are bytes, an attribute `dtype` says of which type
  int8_t table[kLevels];  // the level of each code
  int pairs = 0;          // of a codebook: a code stands for two rows of a column, for the numbers of a pair with `middle` added

  // Whether scales are stored as bytes.
  QCOMPILE_INLINE constexpr bool byte_scales() const { return scales != Stored::kNumbers; }
  // What the levels of the body are of those of the table.
  QCOMPILE_INLINE constexpr int levels_by() const { return scales == Stored::kE4M3 ? 4 : 1; }
  // Whether a weight may have zero points, or signed codes.
  QCOMPILE_INLINE constexpr bool zeros() const { return affine && !pairs; }
  // The row of kFormats whose blocks its codes are brought into to be multiplied; -1 where products take them as they are.
  QCOMPILE_INLINE constexpr int base() const { return pairs || (bits > 4 && bits < 8) ? 1 : bits < 4 ? 0 : -1; }
  // Codes lie in fields of bits, in a file and in panels, the lowest bits first: 7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1.
  QCOMPILE_INLINE constexpr bool in_fields() const { return base() >= 0; }
  QCOMPILE_INLINE static constexpr int widest_field(int left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }
  QCOMPILE_INLINE constexpr int low() const { return widest_field(bits); }
  QCOMPILE_INLINE constexpr int high() const { return bits - low(); }  // in one field or two
  QCOMPILE_INLINE constexpr int narrowest_field() const { return bits & -bits; }
  // Rows of a column that share a code; rows of codes of k rows.
  QCOMPILE_INLINE constexpr int shared() const { return pairs ? 2 : 1; }
  QCOMPILE_INLINE constexpr int64_t code_rows(int64_t k) const { return (k + shared() - 1) / shared(); }
  // Rows of bytes of k rows of codes in a file.
  QCOMPILE_INLINE constexpr int64_t byte_rows(int64_t k) const {
    int64_t rows = 0;
    for (int left = bits; left > 0; left -= widest_field(left)) rows += (code_rows(k) * widest_field(left) + 7) / 8;
    return rows;
  }
  // Rows of codes of a unit, its rows k, and its bytes in a panel: as many whole blocks of each field as hold the same rows
  // (layout.h).
  QCOMPILE_INLINE constexpr int unit_codes() const { return 4 * 8 / narrowest_field(); }
  QCOMPILE_INLINE constexpr int unit_rows() const { return shared() * unit_codes(); }
  QCOMPILE_INLINE constexpr int unit_bytes() const { return 8 * unit_codes() * bits; }
  // Rows k of a block: what four bytes of a column hold. Of formats without a base, a unit is a block.
  QCOMPILE_INLINE constexpr int block_rows() const { return 4 * 8 / bits; }
  QCOMPILE_INLINE constexpr int last_code() const { return (1 << bits) - 1; }
  // What products multiply for a code that is no pair's; of signed codes, for one with `middle` added.
  QCOMPILE_INLINE constexpr int integer(int code) const { return affine ? code : table[code] + middle; }
  QCOMPILE_INLINE constexpr int largest() const {
    int most = pairs ? 255 : 0;
    for (int code = 0; code <= last_code(); ++code) most = integer(code) > most ? integer(code) : most;
    return most;
  }
};

constexpr Format kFormats[] = {
    {"Int4", 4, 8, true, Stored::kNumbers, {}},
    {"Int8", 8, 128, true, Stored::kNumbers, {}},
    {"NF4", 4, 128, false, Stored::kNumbers, {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127}},
    {"MXFP4", 4, 16, false, Stored::kPowers, {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}},
    // The table of MXFP4, a quarter of the body's, and four times its scales: products of small levels are faster.
    {"NVFP4", 4, 16, false, Stored::kE4M3, {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}},
    {"Int2", 2, 2, true, Stored::kNumbers, {}},
    {"Int3", 3, 4, true, Stored::kNumbers, {}},
    {"Int5", 5, 16, true, Stored::kNumbers, {}},
    {"Int6", 6, 32, true, Stored::kNumbers, {}},
    {"FP4", 4, 128, false, Stored::kNumbers, {0, 1, 85, 127, 42, 64, 21, 32, 0, -1, -85, -127, -42, -64, -21, -32}},
    {"IQ4NL", 4, 128, false, Stored::kNumbers, {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}},
    {"Pairs16", 4, 128, true, Stored::kNumbers, {}, 16},
    {"Pairs32", 5, 128, true, Stored::kNumbers, {}, 32},
    {"Pairs64", 6, 128, true, Stored::kNumbers, {}, 64},
    {"Pairs128", 7, 128, true, Stored::kNumbers, {}, 128},
    {"Pairs256", 8, 128, true, Stored::kNumbers, {}, 256},
};
constexpr int kFormatCount = int(sizeof kFormats / sizeof kFormats[0]);

// Integers fit a byte, 0 is among them, and levels have a sign that can be turned.
QCOMPILE_INLINE constexpr bool are_sound() {
  for (const Format& format : kFormats) {
    if (format.bits != 4 && !format.affine) return false;
    const int base = format.base();
    if (base >= 0 && (kFormats[base].bits != (format.bits < 4 ? 4 : 8) || !kFormats[base].affine)) return false;
    if (format.pairs && (format.pairs != 1 << format.bits || format.middle != kFormats[base].middle)) return false;
    if (format.middle & (format.middle - 1) || format.largest() > 255) return false;
    if (format.affine) continue;
    for (const int level : format.table) {
      if (level < -127 || level + format.middle < 0) return false;
    }
  }
  return true;
}
static_assert(are_sound(), "a row of kFormats does not go with the kernels");

// The number of row 0 or 1 that a code of a codebook of so many pairs stands for.
QCOMPILE_INLINE constexpr int paired(int pairs, int code, int row) { return kCodebooks[pairs - 16 + code][row]; }

// The integers of a table in the order of the codes, 16 bytes that are looked up with a shuffle; less some number.
struct alignas(16) Levels {
  uint8_t of[kLevels];
};

QCOMPILE_INLINE constexpr Levels levels_of(const Format& format, int less = 0) {
  Levels levels{};
  for (int code = 0; code < kLevels; ++code) levels.of[code] = uint8_t(format.integer(code) - less);
  return levels;
}

// The integers of pairs: the first numbers of all, then the second ones; of less than 64, again and again.
template <int kPairs>
struct alignas(64) PairLevels {
  uint8_t of[2][kPairs > 64 ? kPairs : 64];
};

template <int kPairs>
QCOMPILE_INLINE constexpr PairLevels<kPairs> pair_levels() {
  PairLevels<kPairs> levels{};
  for (int row = 0; row < 2; ++row) {
    for (int i = 0; i < int(sizeof levels.of[row]); ++i) levels.of[row][i] = uint8_t(paired(kPairs, i % kPairs, row) + 128);
  }
  return levels;
}

}  // namespace qcompile
