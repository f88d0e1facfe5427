// From the layout of the file (ONNX: row-major (K, N), 4-bit elements packed over the whole tensor) to packed panels.
#pragma once

#include "layout.h"

namespace qcompile {

struct Source {
  const uint8_t* codes;        // (K, N) of 4 or 8 bits; or fields of bits, (byte_rows(K), N) of bytes: field after field,
                               // row j of the B of one of w bits has row j + i B of the codes from bit w i on
  const void* scale;           // (file groups, N) fp32 or fp16; or bytes, as the format says
  bool scale_is_half;          // fp16; what bytes stand for is rounded to it
  const uint8_t* zero_point;   // (file groups, N) packed like the codes, or nullptr: 0 for signed, and for unsigned codes
                               // too, but the middle for fields
  bool is_signed;              // int4 / int8 instead of uint4 / uint8
  int exponent = 0;            // of E4M3 scales: they are multiplied by 2^exponent
};

// The layout of a weight: fp16 scales where every scale is exactly an fp16 number, so that packing them as such loses
// nothing; no zero points where they all are the middle of the range.
Layout make_layout(int64_t k, int64_t n, int64_t block_size, int format, const Source& source);

// Whether every scale is finite.
bool scales_are_finite(const Layout& layout, const Source& source);

// Fills layout.bytes() bytes at `packed` (64-byte aligned). Columns behind N become zeros.
// Signed codes are stored with the middle of the format added, and so are their zero points.
void pack(const Layout& layout, const Source& source, uint8_t* packed);

// Decodes rows [begin, end) of panel column `column` (0 … N - 1) back to floats; for tests and for the float path.
void unpack_column(const Layout& layout, const uint8_t* packed, int64_t column, float* w /* (K,) */);

}  // namespace qcompile
