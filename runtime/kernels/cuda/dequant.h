// Codes to 16-bit operands by bit tricks, for host and device. Every step is exact; scales are applied elsewhere.
//
// A code n is placed into the mantissa of a number whose unit in the last place is 1, and the same pattern of the zero
// point z is subtracted: n - z. Where it is cheaper to place the code 4 bits higher, the difference is 16 (n - z).
#pragma once

#include "device.h"

namespace qcompile::cuda {

// What rows g + 8 of an A operand (registers 1 and 3) are multiplied by to be n - z; rows g are n - z.
template <bool bfloat, int bits>
constexpr float kHighFactor = !bfloat && bits == 4 ? 0.0625f : 1.0f;

// Eight 4-bit codes -> four pairs, nibbles i and i + 4 in pair i.
// fp16: 1024 + n in pairs 0 and 2, 1024 + 16 n in pairs 1 and 3, for a shift instead of three.
// bf16: 128 + n in all pairs; 7 bits of mantissa do not hold 16 n.
template <bool bfloat>
QCOMPILE_HD void unpack_nibbles(uint32_t q, uint32_t (&pairs)[4]) {
  if constexpr (bfloat) {
    pairs[0] = and_or(q, 0x000f000f, 0x43004300);
    pairs[1] = and_or(q >> 4, 0x000f000f, 0x43004300);
    pairs[2] = and_or(q >> 8, 0x000f000f, 0x43004300);
    pairs[3] = and_or(q >> 12, 0x000f000f, 0x43004300);
  } else {
    pairs[0] = and_or(q, 0x000f000f, 0x64006400);
    pairs[1] = and_or(q, 0x00f000f0, 0x64006400);
    pairs[2] = and_or(q >> 8, 0x000f000f, 0x64006400);
    pairs[3] = and_or(q >> 8, 0x00f000f0, 0x64006400);
  }
}

// Bytes i and i + 1 of q as the fp16 pair 1024 + n; i is 0 or 2.
QCOMPILE_HD uint32_t half_pair_of_bytes(uint32_t q, int i) { return permute(q, 0x64646464, i ? 0x4342 : 0x4140); }

// Byte i of q as the pattern of the fp32 number 2^23 + n.
QCOMPILE_HD uint32_t float_of_byte(uint32_t q, int i) { return permute(q, 0x4b000000, 0x7440 + uint32_t(i)); }

// Two fp32 numbers that bf16 holds exactly -> a pair: the upper halves.
QCOMPILE_HD uint32_t bfloat_pair(float low, float high) { return permute(as_bits(low), as_bits(high), 0x7632); }

// Zero points of a group for a lane: rows g and g + 8 of four tiles, from one word (4 bits) or two (8 bits).
template <bool bfloat, int bits>
struct Zeros {
  uint32_t parts[bits == 4 ? 4 : 2];

  QCOMPILE_HD void set(uint32_t first, uint32_t second) {
    if constexpr (bits == 4) {
      unpack_nibbles<bfloat>(first, parts);
    } else {
      parts[0] = first;
      parts[1] = second;
    }
  }

  // What dequantize subtracts in rows g (high = 0) or g + 8 (1) of a tile: a pair; bf16 of 8 bits: one fp32 number.
  QCOMPILE_HD uint32_t pattern(int tile, int high) const {
    if constexpr (bits == 4) {
      const uint32_t pair = parts[tile / 2 * 2 + high];
      return permute(pair, 0, tile % 2 ? 0x3232 : 0x1010);
    } else {
      const int byte = tile % 2 * 2 + high;
      if constexpr (bfloat) return float_of_byte(parts[tile / 2], byte);
      return permute(parts[tile / 2], 0x64646464, 0x4040 + 0x0101 * uint32_t(byte));
    }
  }
};

// The codes of one A operand (q: one word of 4 bits, two of 8) -> its registers; low and high as Zeros::pattern gives.
template <bool bfloat, int bits>
QCOMPILE_HD void dequantize(uint32_t q0, uint32_t q1, uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  if constexpr (bits == 4) {
    unpack_nibbles<bfloat>(q0, a);
    QCOMPILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t zero = i % 2 ? high : low;
      a[i] = bfloat ? subtract_bfloats(a[i], zero) : subtract_halves(a[i], zero);
    }
  } else {
    QCOMPILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t q = i < 2 ? q0 : q1, zero = i % 2 ? high : low;
      if constexpr (bfloat) {  // 255 has 8 bits, one more than bf16's mantissa field: by way of fp32
        a[i] = bfloat_pair(as_float(float_of_byte(q, i % 2 * 2)) - as_float(zero),
                           as_float(float_of_byte(q, i % 2 * 2 + 1)) - as_float(zero));
      } else {
        a[i] = subtract_halves(half_pair_of_bytes(q, i % 2 * 2), zero);
      }
    }
  }
}

}  // namespace qcompile::cuda
