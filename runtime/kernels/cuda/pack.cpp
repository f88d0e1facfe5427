#include "pack.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "../half.h"

namespace qcompile::cuda {
namespace {

// Codes of one step of one block, one a byte: [k][n].
using Step = uint8_t[kStepK][kBlockN];

// What is added to signed codes to make them unsigned; in two's complement that is a flip of the top bit.
uint8_t flip_of(const Layout& layout, const Source& source) {
  return source.is_signed ? uint8_t(1 << (layout.bits - 1)) : 0;
}

// Zero point of a weight that has none in the file. Zero points are added to like codes, and an absent one is 0.
uint8_t default_zero_point(const Layout& layout, const Source& source) { return flip_of(layout, source); }

// `count` elements from `index` on of a tensor whose 4-bit elements lie two in a byte, the first one low. Where n is
// odd, every second row begins with a high nibble.
void read_row(const uint8_t* codes, int bits, int64_t index, int count, uint8_t flip, uint8_t* out) {
  if (bits == 8) {
    for (int i = 0; i < count; ++i) out[i] = uint8_t(codes[index + i] ^ flip);
    return;
  }
  const uint8_t* pairs = codes + index / 2;
  int i = 0;
  if (index % 2 && count) out[i++] = uint8_t((*pairs++ >> 4) ^ flip);
  for (; i + 2 <= count; i += 2, ++pairs) {
    out[i] = uint8_t((*pairs & 15) ^ flip);
    out[i + 1] = uint8_t((*pairs >> 4) ^ flip);
  }
  if (i < count) out[i] = uint8_t((*pairs & 15) ^ flip);
}

// Zero points of one group of one block, one a byte: (64,). Groups and columns that the file lacks get the default.
void read_zeros(const Layout& layout, const Source& source, int64_t block, int64_t group, uint8_t* zeros) {
  std::memset(zeros, default_zero_point(layout, source), kBlockN);
  const int64_t column = block * kBlockN, columns = std::min<int64_t>(kBlockN, layout.n - column);
  if (!source.zero_point || group * layout.block_size >= layout.k) return;
  read_row(source.zero_point, layout.bits, group * layout.n + column, int(columns), flip_of(layout, source), zeros);
}

// zeros: (64,) of each group, as read_zeros gives them
void read_step(const Layout& layout, const Source& source, int64_t block, int64_t step, const uint8_t* zeros,
               Step& out) {
  const int64_t column = block * kBlockN, columns = std::min<int64_t>(kBlockN, layout.n - column);
  for (int k = 0; k < kStepK; ++k) {
    const int64_t packed_row = step * kStepK + k, row = source_row(layout, packed_row);
    if (row < 0 || columns < kBlockN) std::memcpy(out[k], zeros + packed_row / layout.group * kBlockN, kBlockN);
    if (row < 0) continue;
    read_row(source.codes, layout.bits, row * layout.n + column, int(columns), flip_of(layout, source), out[k]);
  }
}

uint32_t word_of_4bit(const Step& step, int n, int k, int lane) {
  uint32_t word = 0;
  for (int e = 0; e < 8; ++e) {
    word |= uint32_t(step[k + element_k(lane, e)][n + element_row(lane, e)]) << (4 * element_nibble(e));
  }
  return word;
}

uint64_t word_of_8bit(const Step& step, int n, int k, int lane) {
  uint64_t word = 0;
  for (int e = 0; e < 8; ++e) {
    word |= uint64_t(step[k + element_k(lane, e)][n + element_row(lane, e)]) << (8 * e);
  }
  return word;
}

// out: the bytes of one step of one block
void write_step(int bits, const Step& step, uint8_t* out) {
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int part = 0; part < kStepK / kTile; ++part, out += bits) {
        if (bits == 4) {
          const uint32_t word = word_of_4bit(step, tile * kTile, part * kTile, lane);
          std::memcpy(out, &word, 4);
        } else {
          const uint64_t word = word_of_8bit(step, tile * kTile, part * kTile, lane);
          std::memcpy(out, &word, 8);
        }
      }
    }
  }
}

// scales: of all groups of the block
void write_scales(const Layout& layout, const Source& source, int64_t block, int64_t group, uint8_t* scales) {
  const int width = layout.scale_bytes();
  const bool exists = group * layout.block_size < layout.k;
  for (int n = 0; n < kBlockN; ++n) {
    uint8_t* out = scales + scale_index(layout, 0, group, n / kTile, n % kTile) * width;
    std::memset(out, 0, size_t(width));
    const int64_t column = block * kBlockN + n;
    if (!exists || column >= layout.n) continue;
    std::memcpy(out, static_cast<const uint8_t*>(source.scale) + (group * layout.n + column) * width, size_t(width));
  }
}

// zeros: of all groups of the block
void write_zeros(const Layout& layout, const uint8_t* values, int64_t group, uint8_t* zeros) {
  if (layout.bits == 8) {
    for (int n = 0; n < kBlockN; ++n) zeros[scale_index(layout, 0, group, n / kTile, n % kTile)] = values[n];
    return;
  }
  for (int g = 0; g < 8; ++g) {
    uint32_t word = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int row = g; row < kTile; row += 8) {
        word |= uint32_t(values[tile * kTile + row]) << (4 * zero_nibble(tile, row));
      }
    }
    std::memcpy(zeros + 4 * zero_word(layout, 0, group, g), &word, 4);
  }
}

// ---- The way back, element by element

int code_at(const Layout& layout, const uint8_t* codes, int64_t n, int64_t k) {
  const int row = int(n % kTile), in = int(k % kTile);
  const int lane = row % 8 * 4 + in % 8 / 2, e = in % 2 + row / 8 * 2 + in / 8 * 4;
  const int tile = int(n % kBlockN / kTile), part = int(k % kStepK / kTile);
  const uint8_t* word = codes + code_offset(layout, n / kBlockN, k / kStepK, tile, lane, part);
  if (layout.bits == 8) return word[e];
  return word[element_nibble(e) / 2] >> (4 * (element_nibble(e) % 2)) & 15;
}

int zero_at(const Layout& layout, const uint8_t* zeros, int64_t n, int64_t group) {
  const int tile = int(n % kBlockN / kTile), row = int(n % kTile), nibble = zero_nibble(tile, row);
  if (layout.bits == 8) return zeros[scale_index(layout, n / kBlockN, group, tile, row)];
  return zeros[4 * zero_word(layout, n / kBlockN, group, row) + nibble / 2] >> (4 * (nibble % 2)) & 15;
}

float scale_at(const Layout& layout, const uint8_t* scales, int64_t n, int64_t group) {
  const int64_t index = scale_index(layout, n / kBlockN, group, int(n % kBlockN / kTile), int(n % kTile));
  uint32_t bits = 0;
  std::memcpy(&bits, scales + index * layout.scale_bytes(), size_t(layout.scale_bytes()));
  if (layout.element == Element::kHalf) return half_to_float(uint16_t(bits));
  if (layout.element == Element::kBfloat16) bits <<= 16;  // the upper half of an fp32
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

}  // namespace

void pack_blocks(const Layout& layout, const Source& source, int64_t begin, int64_t end, const Packed& out) {
  std::unique_ptr<uint8_t[]> zeros(new uint8_t[size_t(layout.groups() * kBlockN)]);  // of one block, one a byte
  Step step;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block - out.first;  // in the buffers
    for (int64_t group = 0; group < layout.groups(); ++group) {
      uint8_t* values = zeros.get() + group * kBlockN;
      read_zeros(layout, source, block, group, values);
      write_zeros(layout, values, group, out.zeros + at * (layout.zeros_bytes() / layout.blocks()));
      write_scales(layout, source, block, group, out.scales + at * (layout.scales_bytes() / layout.blocks()));
    }
    for (int64_t s = 0; s < layout.steps(); ++s) {
      read_step(layout, source, block, s, zeros.get(), step);
      write_step(layout.bits, step, out.codes + code_offset(layout, at, s, 0, 0, 0));
    }
  }
}

void unpack(const Layout& layout, const Packed& packed, float* w) {
  for (int64_t p = 0; p < layout.padded_k; ++p) {
    const int64_t row = source_row(layout, p), group = p / layout.group;
    if (row < 0) continue;
    for (int64_t n = 0; n < layout.n; ++n) {
      const int difference = code_at(layout, packed.codes, n, p) - zero_at(layout, packed.zeros, n, group);
      w[row * layout.n + n] = float(difference) * scale_at(layout, packed.scales, n, group);
    }
  }
}

}  // namespace qcompile::cuda
