// From the layout of the file to the layout of the CUDA kernels, on the host.
#pragma once

#include <cstdint>

#include "../packing.h"
#include "layout.h"

namespace qcompile::cuda {

// Where the parts of a packed weight go: host buffers of layout.codes_bytes(), scales_bytes(), zeros_bytes() bytes.
struct Packed {
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* zeros;
  int64_t first = 0;  // block that the buffers begin with, where they hold some of the blocks only
};

// Fills all bytes, blocks [begin, end) only. Signed codes and zero points are stored with 8 (128) added; weights without
// zero points get 8 (128; 0 where the codes are unsigned and the file has no zero points). Filled-up rows hold their
// zero point, filled-up columns scale 0.
void pack_blocks(const Layout& layout, const Source& source, int64_t begin, int64_t end, const Packed& out);

// W (k, n) as fp32, decoded by layout.h's maps alone; the oracle of the tests.
void unpack(const Layout& layout, const Packed& packed, float* w);

}  // namespace qcompile::cuda
