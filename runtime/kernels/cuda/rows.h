// Kernels that go over rows: x as the products take it, columns of the weight as cuBLAS takes them, and what cuBLAS
// leaves undone. Unverified on GPU; rows_check.cpp runs them on the emulator.
#pragma once

#include "device.h"

namespace qcompile::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kLanes;
constexpr int kPrepareShared = kRowWarps * 4;  // bytes

// ---- Elements of the three types, as fp32.

template <Element element>
struct Bits {
  using Type = uint16_t;
};
template <>
struct Bits<Element::kFloat> {
  using Type = float;
};

template <Element element>
QCOMPILE_DEVICE float number_at(const void* elements, int64_t index) {
  const auto bits = load_global(static_cast<const typename Bits<element>::Type*>(elements) + index);
  if constexpr (element == Element::kHalf) return half_number(bits);
  else if constexpr (element == Element::kBfloat16) return bfloat_number(bits);
  else return bits;
}

template <Element element>
QCOMPILE_DEVICE void store_number(void* elements, int64_t index, float value) {
  auto* to = static_cast<typename Bits<element>::Type*>(elements) + index;
  if constexpr (element == Element::kHalf) store_global(to, half_bits(value));
  else if constexpr (element == Element::kBfloat16) store_global(to, bfloat_bits(value));
  else store_global(to, value);
}

// The 16 bits that tensor cores multiply: bf16 for bf16, fp16 for the others.
template <Element element>
QCOMPILE_DEVICE uint32_t operand_bits(float value) {
  return element == Element::kBfloat16 ? bfloat_bits(value) : half_bits(value);
}

// ---- prepare: one CTA of kRowThreads a row

constexpr uint32_t kInfinityBits = 0x7f800000;

// Largest magnitude of row (k,), NaN and infinity left out, as the bits of an fp32: these are ordered like integers.
QCOMPILE_DEVICE uint32_t largest_finite(const float* row, int64_t k) {
  uint32_t largest = 0;
  for (int64_t i = thread_x(); i < k; i += kRowThreads) {
    const uint32_t magnitude = as_bits(load_global(row + i)) & 0x7fffffff;
    if (magnitude < kInfinityBits && magnitude > largest) largest = magnitude;
  }
  for (int mask = kLanes / 2; mask; mask /= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    if (other > largest) largest = other;
  }
  if (thread_x() % kLanes == 0) store_shared(shared_base() + uint32_t(thread_x() / kLanes * 4), largest);
  block_barrier();
  for (int warp = 0; warp < kRowWarps; ++warp) {
    const uint32_t other = load_shared(shared_base() + uint32_t(warp * 4));
    if (other > largest) largest = other;
  }
  return largest;
}

// e such that 2^-e brings the largest magnitude to [2^14, 2^15): all of fp16's range below, and no sum of two rounds to
// infinity. At least -126: 2^e and 2^-e are normal numbers then, and rows below 2^-112 only lose what fp32 has lost.
QCOMPILE_DEVICE int row_exponent(uint32_t largest) {
  const int e = int(largest >> 23) - 127 - 14;
  return largest == 0 ? 0 : e < -126 ? -126 : e;
}

QCOMPILE_DEVICE float power_of_two(int e) { return as_float(uint32_t(e + 127) << 23); }

// Row block_x() of x (m, k) -> the same row of prepared (m, padded_k); kFloat: times 2^-e, row_factor (m,) = 2^e.
// NaN and infinity have no part in e and stay what they are in fp16, so that every sum they enter becomes what it would
// in fp32: infinity times a weight, NaN for infinity times 0 and for infinities of both signs. The other elements stay
// finite, and the sums of other rows never meet them. Elements below 2^-39 of the largest become 0.
template <Element element>
QCOMPILE_DEVICE void prepare_row(const Layout& layout, const void* x, void* prepared, float* row_factor) {
  const int64_t row = block_x();
  float inverse = 1;
  if constexpr (element == Element::kFloat) {
    const int e = row_exponent(largest_finite(static_cast<const float*>(x) + row * layout.k, layout.k));
    inverse = power_of_two(-e);
    if (thread_x() == 0) store_global(row_factor + row, power_of_two(e));
  }
  uint32_t* out = static_cast<uint32_t*>(prepared) + row * (layout.padded_k / 2);
  for (int64_t pair = thread_x(); pair < layout.padded_k / 2; pair += kRowThreads) {
    uint32_t bits = 0;
    for (int i = 0; i < 2; ++i) {
      const int64_t from = source_row(layout, 2 * pair + i);
      const float value = from < 0 ? 0 : number_at<element>(x, row * layout.k + from) * inverse;
      bits |= operand_bits<element>(value) << (16 * i);
    }
    store_global(out + pair, bits);
  }
}

// ---- dequantize: a CTA of 128 threads a step of a block, a warp a tile

constexpr int kDequantizeThreads = kTiles * kLanes;
// Rows (columns of the weight) of 64 k in shared memory; 16 bytes more, so that the 8 rows of a warp meet all banks.
constexpr int kDequantizedRow = kStepK * 2 + 16;
constexpr int kDequantizeShared = kBlockN * kDequantizedRow;

// An integer below 2^23 as fp32 plus 2^23: no conversion, which is slow. Differences of two are exact.
QCOMPILE_DEVICE float shifted(uint32_t integer) { return as_float(0x4b000000 | integer); }

// A column's scale and zero point (shifted).
struct Affine {
  float scale, zero;
};

template <Element element>
QCOMPILE_DEVICE Affine affine_of(const Layout& layout, const void* scales, const void* zeros, int64_t block,
                                 int64_t group, int tile, int row) {
  const int64_t index = scale_index(layout, block, group, tile, row);
  uint32_t zero;
  if (layout.bits == 8) {
    zero = load_global(static_cast<const uint8_t*>(zeros) + index);
  } else {
    const uint32_t word = load_global(static_cast<const uint32_t*>(zeros) + zero_word(layout, block, group, row));
    zero = word >> (4 * zero_nibble(tile, row)) & 15;
  }
  return {number_at<element>(scales, index), shifted(zero)};
}

// Code e of a lane's word (two words: low, high).
QCOMPILE_DEVICE uint32_t code_of(int bits, uint32_t low, uint32_t high, int e) {
  if (bits == 4) return low >> (4 * element_nibble(e)) & 15;
  return (e < 4 ? low : high) >> (8 * (e % 4)) & 255;
}

// The 8 elements of a lane in operand `part` of tile `tile` -> shared memory. `of`: the lane's rows g and g + 8.
template <Element element>
QCOMPILE_DEVICE void dequantize_word(int bits, uint32_t low, uint32_t high, const Affine (&of)[2], int tile, int part) {
  const int lane = thread_x() % kLanes;
  QCOMPILE_UNROLL
  for (int e = 0; e < 8; e += 2) {
    const Affine& column = of[e / 2 % 2];  // a constant once the loop is unrolled: no local memory
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
      const float difference = shifted(code_of(bits, low, high, e + i)) - column.zero;
      pair |= operand_bits<element>(difference * column.scale) << (16 * i);
    }
    const int row = tile * kTile + element_row(lane, e), k = part * kTile + element_k(lane, e);
    store_shared(shared_base() + uint32_t(row * kDequantizedRow + k * 2), pair);
  }
}

// Step block_x() of block first / 64 + block_y() -> out (count, padded_k), whose row 0 is column `first`, a multiple of
// 64. The product of scale and difference is rounded once.
template <Element element>
QCOMPILE_DEVICE void dequantize_step(const Layout& layout, const void* codes, const void* scales, const void* zeros,
                                     int64_t first, int64_t count, void* out) {
  const int64_t step = block_x(), block = first / kBlockN + block_y();
  const int tile = thread_x() / kLanes, lane = thread_x() % kLanes;
  const bool bytes = layout.bits == 8;
  const auto* from = static_cast<const Words4*>(codes) + code_offset(layout, block, step, tile, lane, 0) / 16;
  const Words4 a = load_global(from), b = bytes ? load_global(from + 1) : Words4{};
  const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};  // indices are constants once unrolled
  QCOMPILE_UNROLL
  for (int part = 0; part < kStepK / kTile; ++part) {
    const int64_t group = (step * kStepK + part * kTile) / layout.group;
    const Affine of[2] = {affine_of<element>(layout, scales, zeros, block, group, tile, lane / 4),
                          affine_of<element>(layout, scales, zeros, block, group, tile, lane / 4 + 8)};
    const uint32_t low = bytes ? words[2 * part] : words[part], high = words[2 * part + 1];
    dequantize_word<element>(layout.bits, low, high, of, tile, part);
  }
  block_barrier();
  constexpr int pieces = kStepK * 2 / 16;  // of 16 bytes, of a row
  for (int i = thread_x(); i < kBlockN * pieces; i += kDequantizeThreads) {
    const int row = i / pieces, piece = i % pieces;
    const int64_t column = block_y() * int64_t(kBlockN) + row;
    if (column >= count) break;  // and so are all that follow
    const Words4 words = load_shared_4(shared_base() + uint32_t(row * kDequantizedRow + piece * 16));
    store_global(static_cast<Words4*>(out) + (column * layout.padded_k + step * kStepK) / 8 + piece, words);
  }
}

// ---- finish: one CTA of kRowThreads a row

// Row block_x() of y (m, n) times row_factor (m,) plus bias (n,); either may be nullptr.
template <Element element>
QCOMPILE_DEVICE void finish_row(int64_t n, void* y, const float* row_factor, const void* bias) {
  const int64_t row = block_x();
  const float factor = row_factor ? load_global(row_factor + row) : 1;
  for (int64_t column = thread_x(); column < n; column += kRowThreads) {
    const float plus = bias ? number_at<element>(bias, column) : 0;
    store_number<element>(y, row * n + column, number_at<element>(y, row * n + column) * factor + plus);
  }
}

}  // namespace qcompile::cuda
