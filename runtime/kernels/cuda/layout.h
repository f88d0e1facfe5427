// A packed weight as the CUDA kernels read it: the one owner of that layout, for host and device.
//
// Products are computed as Yᵀ (N, M) = Wᵀ (N, K) Xᵀ (K, M): columns n of the weight are the rows of the tensor-core
// operand A, tokens are its columns. A lane finds the codes of its four A registers (PTX ISA, mma.m16n8k16) in one word.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QCOMPILE_HD __host__ __device__ __forceinline__
#else
#define QCOMPILE_HD inline
#endif

namespace qcompile::cuda {

// What x, bias and y are. kFloat is computed in fp16: rows of x are scaled by a power of two and rounded to fp16 first.
enum class Element : int { kHalf, kBfloat16, kFloat };

constexpr int kTile = 16;                             // rows and k of one A operand
constexpr int kBlockN = 64;                           // columns n that lie together: four tiles, a warpgroup's rows
constexpr int kTiles = kBlockN / kTile;
constexpr int kStepK = 64;                            // k that lie together: four A operands of a tile
constexpr int kLanes = 32;
constexpr int kRegisters = 4;                         // 32-bit registers of A, two 16-bit elements each

QCOMPILE_HD int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Layout {
  int64_t k, n;        // of the weight
  int64_t block_size;  // rows of a group in the file; at most k
  int bits;            // 4 or 8
  Element element;     // scales are fp16, bf16, or fp32 for kFloat
  int64_t group;       // rows of a group here: 32, or a multiple of 64
  int64_t padded_k, padded_n;  // multiples of 64

  // Rows of a group that is longer here than in the file are filled up, and so are rows of x (see source_row).
  QCOMPILE_HD bool regroups() const { return group != block_size; }
  // Whether x can be read as it lies: rows of padded_k elements, 16-byte aligned.
  QCOMPILE_HD bool takes_x_as_it_is() const { return element != Element::kFloat && padded_k == k && !regroups(); }
  QCOMPILE_HD int64_t groups() const { return (padded_k + group - 1) / group; }
  QCOMPILE_HD int64_t blocks() const { return padded_n / kBlockN; }
  QCOMPILE_HD int64_t steps() const { return padded_k / kStepK; }
  QCOMPILE_HD int scale_bytes() const { return element == Element::kFloat ? 4 : 2; }
  QCOMPILE_HD int64_t step_bytes() const { return int64_t(kBlockN) * kStepK * bits / 8; }
  QCOMPILE_HD int64_t codes_bytes() const { return blocks() * steps() * step_bytes(); }
  QCOMPILE_HD int64_t scales_bytes() const { return groups() * padded_n * scale_bytes(); }
  QCOMPILE_HD int64_t zeros_bytes() const { return groups() * padded_n * bits / 8; }
  QCOMPILE_HD int64_t bytes() const { return codes_bytes() + scales_bytes() + zeros_bytes(); }
};

// Row of the file's weight (and column of x) at packed row p, or -1 where p is filled up with zeros.
QCOMPILE_HD int64_t source_row(const Layout& layout, int64_t p) {
  const int64_t row = layout.regroups() ? p / layout.group * layout.block_size + p % layout.group : p;
  const bool inside = !layout.regroups() || p % layout.group < layout.block_size;
  return inside && row < layout.k ? row : -1;
}

inline Layout make_layout(int64_t k, int64_t n, int64_t block_size, int bits, Element element) {
  Layout layout{k, n, block_size < k ? block_size : k, bits, element, 0, 0, round_up(n, kBlockN)};
  const bool whole = layout.block_size == k;  // one group: padding goes to its end, which is no other group's beginning
  layout.group = layout.block_size <= 32 && !whole ? 32 : round_up(layout.block_size, kStepK);
  if (whole) layout.block_size = layout.group;  // source_row: rows behind k are filled up
  const int64_t groups = (k + layout.block_size - 1) / layout.block_size;
  layout.padded_k = layout.regroups() ? round_up(groups * layout.group, kStepK) : round_up(k, kStepK);
  return layout;
}

// ---- Codes: [block][step][tile][lane][bits / 4 x 16 bytes]. A lane's 16 (32) bytes hold, for each of the 4 operands of
// the step, one word (two words) with the codes of its registers R0 … R3, low and high element.

// Row within the tile and k within the operand of element e (0 … 7) of a lane: registers R0.low, R0.high, R1.low, ….
QCOMPILE_HD int element_row(int lane, int e) { return lane / 4 + 8 * (e / 2 % 2); }
QCOMPILE_HD int element_k(int lane, int e) { return lane % 4 * 2 + e % 2 + 8 * (e / 4); }

// Nibble (from bit 0) of element e in a lane's word of 4-bit codes: low elements in 0 … 3, high ones in 4 … 7, so that a
// mask of 0x000f000f takes out the pair of a register. 8-bit codes lie in order of e.
QCOMPILE_HD int element_nibble(int e) { return e / 2 + 4 * (e % 2); }

// Byte of the first word of a lane, for operand `part` (0 … 3) of a step.
QCOMPILE_HD int64_t code_offset(const Layout& layout, int64_t block, int64_t step, int tile, int lane, int part) {
  const int64_t lanes = (((block * layout.steps() + step) * kTiles + tile) * kLanes + lane) * (4 * layout.bits);
  return lanes + part * layout.bits;
}

// ---- Scales: [block][group][8 lane rows g][8]; the 8 are (tile 0, row g), (tile 0, row g + 8), (tile 1, row g), ….
QCOMPILE_HD int64_t scale_index(const Layout& layout, int64_t block, int64_t group, int tile, int row) {
  return ((block * layout.groups() + group) * 8 + row % 8) * 8 + tile * 2 + row / 8;
}

// ---- Zero points: 4 bits: [block][group][8 lane rows] words; 8 bits: bytes in the order of scales.
// Nibble of (tile, row): even ones are rows g, odd ones g + 8, as in a word of codes; tiles 0, 2 low, 1, 3 high.
QCOMPILE_HD int zero_nibble(int tile, int row) { return row / 8 + 2 * (tile / 2) + 4 * (tile % 2); }
QCOMPILE_HD int64_t zero_word(const Layout& layout, int64_t block, int64_t group, int row) {
  return (block * layout.groups() + group) * 8 + row % 8;
}

}  // namespace qcompile::cuda
