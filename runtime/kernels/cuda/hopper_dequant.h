// Words of 4-bit codes to the A registers of wgmma, zero points subtracted and scales multiplied in.
//
// Differences of codes are exact; the product with the scale is rounded once, to fp16 or bf16. Scales on the sums, as
// in decode.h, would need a second set of accumulators and a wait at the end of every group.
#pragma once

#include "dequant.h"
#include "device.h"

namespace qcompile::cuda::hopper {

// a * b, and a * b + c, for both fp16 numbers of a pair; a * b for bf16. Rounded once.
QCOMPILE_HD uint32_t multiply_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  const uint16_t low = half_bits(half_number(uint16_t(a)) * half_number(uint16_t(b)));
  return uint32_t(half_bits(half_number(uint16_t(a >> 16)) * half_number(uint16_t(b >> 16)))) << 16 | low;
#endif
}

// On the host it is exact only where a b + c is a number of fp32, as it is below.
QCOMPILE_HD uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    return uint32_t(half_bits(half_number(uint16_t(x)) * half_number(uint16_t(y)) + half_number(uint16_t(z))));
  };
  return one(a >> 16, b >> 16, c >> 16) << 16 | one(a, b, c);
#endif
}

QCOMPILE_HD uint32_t multiply_bfloats(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d = 0;
#if __CUDA_ARCH__ >= 900  // nothing older has the instruction, nor runs this
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
#else
  const uint16_t low = bfloat_bits(bfloat_number(uint16_t(a)) * bfloat_number(uint16_t(b)));
  return uint32_t(bfloat_bits(bfloat_number(uint16_t(a >> 16)) * bfloat_number(uint16_t(b >> 16)))) << 16 | low;
#endif
}

// What a lane needs of a group: pairs of equal numbers for its rows g and g + 8.
struct GroupOfLane {
  uint32_t scale[2], zero[2];
};

// scales: those of rows g and g + 8, as layout.h has them. zeros: the lane's word, shifted so that its tile's nibbles
// (zero_nibble) are the lowest two.
template <Element kElement>
QCOMPILE_HD GroupOfLane make_group(uint32_t scales, uint32_t zeros) {
  const uint32_t low = (zeros & 0x0f) * 0x00010001, high = (zeros & 0xf0) * 0x00010001;
  GroupOfLane group{{permute(scales, 0, 0x1010), permute(scales, 0, 0x3232)}, {}};
  if (kElement == Element::kBfloat16) {  // 128 + z
    group.zero[0] = 0x43004300 | low;
    group.zero[1] = 0x43004300 | high >> 4;
  } else {  // 1024 + z, and -(64 + z), whose last bits count sixteenths
    group.zero[0] = 0x64006400 | low;
    group.zero[1] = 0xd400d400 | high;
  }
  return group;
}

// A word of codes (layout.h) to the four registers of m64k16: rows g, g + 8, g, g + 8. Row g + 8 in fp16: 1024 + 16 n,
// a sixteenth of which is 64 + n. (16 (n - z) with a sixteenth of the scale would lose bits of scales below 2^-10.)
template <Element kElement>
QCOMPILE_HD void dequantize(uint32_t q, const GroupOfLane& group, uint32_t (&a)[4]) {
  unpack_nibbles<kElement == Element::kBfloat16>(q, a);
  QCOMPILE_UNROLL
  for (int r = 0; r < 4; ++r) {
    const uint32_t zero = group.zero[r % 2], scale = group.scale[r % 2];
    if (kElement == Element::kBfloat16) {
      a[r] = multiply_bfloats(subtract_bfloats(a[r], zero), scale);
    } else {
      a[r] = r % 2 ? multiply_add_halves(a[r], 0x2c002c00, zero) : subtract_halves(a[r], zero);
      a[r] = multiply_halves(a[r], scale);
    }
  }
}

}  // namespace qcompile::cuda::hopper
