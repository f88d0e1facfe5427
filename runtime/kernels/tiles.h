// What every vector instruction set does alike: walk a row's groups to quantize it, and find the code for a tile's size.
//
// Included by files of one instruction set each. Everything is in an unnamed namespace, so that no copy of a function is
// offered to the linker for files of another one. reference.cpp, the specification, has its own plain form.
#pragma once

#include <utility>

#include "kernels.h"
#include "attention_tile.h"
#include "fields.h"

namespace qcompile {
namespace {

// ---- what each instruction set defines ----

// The largest |x|; a NaN wins over an infinity, and that over every number.
inline float largest(const float* x, int64_t count);

// filled values, and zeros up to depth -> codes from `out` on; the sums of the codes.
template <bool kWide>
inline void quantize_group(const float* x, int64_t filled, int64_t depth, float inverse, int rows, int8_t* out,
                           int32_t* sum, int32_t* low_sum);

// out (rows of the model, 64) = a tile of kRows int8 rows times one panel.
template <int kRows, int kFormat, bool kWide>
void multiply_tile(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out);

// ---- what they share ----

template <bool kWide>
inline float quantize_row(const Layout& layout, const float* x, int rows, int8_t* codes, float* scale, int32_t* sum) {
  constexpr float levels = kWide ? 32512.0f : 127.0f;
  const int64_t groups = layout.groups(), depth = layout.depth();
  float row_largest = 0.0f;
  for (int64_t group = 0; group < groups; ++group, codes += depth * rows) {
    const float* in = x + layout.group_begin(group);
    const int64_t filled = layout.group_rows(group);
    const float amax = largest(in, filled);
    if (!(amax <= row_largest)) row_largest = amax;
    if (!(amax <= 3.402823466e38f)) return amax;  // the caller computes this row in floats
    const bool usable = amax >= kTiny;
    scale[group] = usable ? amax / levels : 0.0f;
    quantize_group<kWide>(in, filled, layout.depth(group), usable ? levels / amax : 0.0f, rows, codes, sum + group,
                          sum + groups + group);
  }
  return row_largest;
}

float quantize(const Layout& layout, const float* x, bool wide, int row, int rows, int8_t* codes, float* scale,
               int32_t* sum) {
  return wide ? quantize_row<true>(layout, x, rows, codes + 4 * row, scale, sum)
              : quantize_row<false>(layout, x, rows, codes + 4 * row, scale, sum);
}

// The code for a tile of up to kRows int8 rows; in the 16-bit mode they are even.
template <int kRows, int kFormat>
inline void multiply_rows(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  if constexpr (kRows > 1) {
    if (tile.rows < kRows) return multiply_rows<kRows - 1, kFormat>(layout, panel, tile, out);
  }
  if (!tile.wide) return multiply_tile<kRows, kFormat, false>(layout, panel, tile, out);
  if constexpr (kRows % 2 == 0) multiply_tile<kRows, kFormat, true>(layout, panel, tile, out);
}

// Codes in fields of bits are brought into the blocks of their base, a group at a time, whose products multiply them.
QCOMPILE_INLINE constexpr int multiplied_as(int format) {
  return kFormats[format].base() < 0 ? format : kFormats[format].base();
}

template <int kRows, int... kFormat>
constexpr Products products_of(std::integer_sequence<int, kFormat...>) {
  return {{Product{multiply_rows<kRows, multiplied_as(kFormat)>, kRows, kRows}...}};
}

// Of all formats, for tiles of up to kRows int8 rows.
template <int kRows>
constexpr Products kProducts = products_of<kRows>(std::make_integer_sequence<int, kFormatCount>());

}  // namespace
}  // namespace qcompile
