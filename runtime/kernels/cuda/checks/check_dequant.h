// The bit tricks of dequant.h, exhaustively; part of cuda_check.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "../dequant.h"

namespace qcompile::cuda {

struct Report {
  const char* name;
  int64_t cases = 0, failures = 0;

  void fail(const std::string& what) {
    if (++failures <= 5) std::printf("  FAILED %s: %s\n", name, what.c_str());
  }
};

inline bool is_pair(bool bfloat, uint32_t pair, int low, int high) {
  const uint16_t a = uint16_t(pair), b = uint16_t(pair >> 16);
  return bfloat ? bfloat_number(a) == float(low) && bfloat_number(b) == float(high)
                : half_number(a) == float(low) && half_number(b) == float(high);
}

// Codes of registers R0 … R3 of both elements, by layout.h; 16 for rows of registers whose factor is in the scale.
template <bool bfloat, int bits>
bool is_operand(const uint32_t (&a)[4], const int (&codes)[8], int low, int high) {
  for (int i = 0; i < 4; ++i) {
    const int factor = i % 2 ? int(1 / kHighFactor<bfloat, bits>) : 1, zero = i % 2 ? high : low;
    if (!is_pair(bfloat, a[i], (codes[2 * i] - zero) * factor, (codes[2 * i + 1] - zero) * factor)) return false;
  }
  return true;
}

// Zero points z0 (rows g) and z1 (rows g + 8) of a tile; the other tiles have others.
template <bool bfloat, int bits>
Zeros<bfloat, bits> zeros_of(int tile, int z0, int z1) {
  uint64_t words = 0;
  for (int i = 0; i < 4; ++i) {
    for (int row = 0; row < 16; row += 8) {
      const int other = (z0 + z1 + 3 * i + row) % (1 << bits), zero = i != tile ? other : row ? z1 : z0;
      words |= uint64_t(zero) << (bits == 4 ? 4 * zero_nibble(i, row) : 8 * (2 * i + row / 8));
    }
  }
  Zeros<bfloat, bits> zeros;
  zeros.set(uint32_t(words), uint32_t(words >> 32));
  return zeros;
}

// All half-words in both positions beside all zero points.
template <bool bfloat>
void check_nibbles(Report& report) {
  for (uint32_t i = 0; i < 2 * 65536; ++i) {
    const uint32_t other = i * 2654435761u >> 16, half = i & 0xffff;
    const uint32_t q = i >> 16 ? half << 16 | other : other << 16 | half;
    int codes[8];
    for (int e = 0; e < 8; ++e) codes[e] = int(q >> (4 * element_nibble(e)) & 15);
    for (int zero = 0; zero < 16; ++zero, ++report.cases) {
      const int tile = int(i + uint32_t(zero)) % 4, z1 = int(other + uint32_t(zero)) % 16;
      const Zeros<bfloat, 4> zeros = zeros_of<bfloat, 4>(tile, zero, z1);
      uint32_t a[4];
      dequantize<bfloat, 4>(q, 0, zeros.pattern(tile, 0), zeros.pattern(tile, 1), a);
      if (!is_operand<bfloat, 4>(a, codes, zero, z1)) report.fail("word " + std::to_string(q));
    }
  }
}

// All pairs of a code and a zero point, in all positions.
template <bool bfloat>
void check_bytes(Report& report) {
  for (int i = 0; i < 65536; ++i) {
    for (int e = 0; e < 8; ++e, ++report.cases) {
      const int tile = (i + e) % 4, zero = i >> 8, other = (i * 7 + e) % 256;
      const Zeros<bfloat, 8> zeros = e / 2 % 2 ? zeros_of<bfloat, 8>(tile, other, zero)
                                               : zeros_of<bfloat, 8>(tile, zero, other);
      int codes[8];
      uint32_t q[2] = {0, 0}, a[4];
      for (int j = 0; j < 8; ++j) {
        codes[j] = (i + (j - e) * 37) & 255;
        q[j / 4] |= uint32_t(codes[j]) << (8 * (j % 4));
      }
      dequantize<bfloat, 8>(q[0], q[1], zeros.pattern(tile, 0), zeros.pattern(tile, 1), a);
      const bool right = e / 2 % 2 ? is_operand<bfloat, 8>(a, codes, other, zero)
                                   : is_operand<bfloat, 8>(a, codes, zero, other);
      if (!right) report.fail("code " + std::to_string(i & 255) + " zero point " + std::to_string(zero));
    }
  }
}

inline int64_t check_dequantization() {
  Report reports[] = {{"4 bits to fp16"}, {"4 bits to bf16"}, {"8 bits to fp16"}, {"8 bits to bf16"}};
  check_nibbles<false>(reports[0]);
  check_nibbles<true>(reports[1]);
  check_bytes<false>(reports[2]);
  check_bytes<true>(reports[3]);
  int64_t failures = 0;
  for (const Report& report : reports) {
    std::printf("%-16s %lld cases, %lld failures\n", report.name, (long long)report.cases, (long long)report.failures);
    failures += report.failures;
  }
  return failures;
}

}  // namespace qcompile::cuda
