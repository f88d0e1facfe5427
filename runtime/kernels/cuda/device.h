// What the kernels need of the device, as functions: PTX under nvcc, the emulator (emulator.h) under g++.
//
// Unverified on GPU. Shared memory is addressed by 32-bit addresses of the shared window only, and read and written by
// these functions only, so that the emulator sees every access. Global memory that a kernel writes goes through them,
// too. Instructions are those of sm_80 (PTX ISA 7.4 and later); nothing here is specific to one architecture.
#pragma once

#include <cstdint>
#include <cstring>

#include "../half.h"
#include "layout.h"

#if defined(__CUDACC__)
#define QCOMPILE_DEVICE __device__ __forceinline__
#define QCOMPILE_UNROLL _Pragma("unroll")
#define QCOMPILE_PRAGMA(words) _Pragma(#words)
#define QCOMPILE_UNROLL_BY(count) QCOMPILE_PRAGMA(unroll (count))
#else
#define QCOMPILE_DEVICE inline
#define QCOMPILE_UNROLL
#define QCOMPILE_UNROLL_BY(count)
#endif

namespace qcompile::cuda {

struct alignas(8) Words2 { uint32_t x, y; };
struct alignas(16) Words4 { uint32_t x, y, z, w; };

// ---- Arithmetic on 32-bit patterns, for host and device. Pairs hold two 16-bit numbers, the first in the low half.

// (a & b) | c, one LOP3.
QCOMPILE_HD uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return (a & b) | c;
#endif
}

// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes a (0 … 3), b (4 … 7): prmt without signs.
QCOMPILE_HD uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return d;
#endif
}

QCOMPILE_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

QCOMPILE_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

QCOMPILE_HD float half_number(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return half_to_float(bits);
#endif
}

QCOMPILE_HD float bfloat_number(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

// fp32 to 16 bits, to nearest, ties to even.
QCOMPILE_HD uint16_t half_bits(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  return float_to_half(value);
#endif
}

QCOMPILE_HD uint16_t bfloat_bits(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // a NaN stays one
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// a - b for both numbers of a pair.
QCOMPILE_HD uint32_t subtract_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  const uint16_t low = half_bits(half_number(uint16_t(a)) - half_number(uint16_t(b)));
  return uint32_t(half_bits(half_number(uint16_t(a >> 16)) - half_number(uint16_t(b >> 16)))) << 16 | low;
#endif
}

QCOMPILE_HD uint32_t subtract_bfloats(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
#if __CUDA_ARCH__ >= 900
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else  // there is no subtraction before sm_90: b * -1 + a, rounded once
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
  return d;
#else
  const uint16_t low = bfloat_bits(bfloat_number(uint16_t(a)) - bfloat_number(uint16_t(b)));
  return uint32_t(bfloat_bits(bfloat_number(uint16_t(a >> 16)) - bfloat_number(uint16_t(b >> 16)))) << 16 | low;
#endif
}

}  // namespace qcompile::cuda

#if defined(__CUDACC__)
#include "device_ptx.h"
#else
#include "emulator/emulator.h"
#endif
