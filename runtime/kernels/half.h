// fp16 <-> fp32 in integer arithmetic, for the reference path and for packing. Round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace qcompile {

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000 | (fraction << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {  // zero or subnormal: fraction * 2^-24, exact in fp32
    float value = float(fraction) * (1.0f / 16777216.0f);
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return uint16_t(sign | 0x7E00 | ((bits >> 13) & 0x1FF));  // a NaN stays one
  if (bits >= 0x477FF000) return uint16_t(sign | 0x7C00);                           // 65520 and up: infinity
  if (bits < 0x38800000) {                                                          // below 2^-14: subnormal
    if (bits < 0x33000000) return sign;                                             // below 2^-25: zero
    uint32_t shift = 126 - (bits >> 23), fraction = (bits & 0x7FFFFF) | 0x800000;
    uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), tie = 1u << (shift - 1);
    if (rest > tie || (rest == tie && (kept & 1))) ++kept;
    return uint16_t(sign | kept);
  }
  uint32_t rounded = bits + 0xFFF + ((bits >> 13) & 1) - (112u << 23);
  return uint16_t(sign | (rounded >> 13));
}

}  // namespace qcompile
