// silu(gate) * up for a run of numbers, in plain C++ that compilers turn into vectors.
//
// Included by reference.cpp and the files of one instruction set each, and compiled with the flags of each. Everything is in
// an unnamed namespace, so that no copy of a function is offered to the linker for files of another one.
#pragma once

#include <cstdint>

namespace qcompile {
namespace {

// exp(t) to 2 units in the last place, t limited to ±87 (both ends and their sums with 1 are normal numbers).
// 2^n exp(r) with n = round(t / ln 2), in the constants of Moshier's Cephes library.
inline float limited_exp(float t) {
  constexpr float kLimit = 87.0f, kRounding = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
  t = t < -kLimit ? -kLimit : t;
  t = t > kLimit ? kLimit : t;
  const float shifted = t * 1.44269504f + kRounding, n = shifted - kRounding;
  const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;  // of a NaN they overflow, and what comes out is a NaN whatever they are
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;  // less the bits of kRounding: n
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return p * power;
}

// y = gate / (1 + exp(-gate)) * up, each (n,). A NaN stays one.
void swiglu(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] / (1.0f + limited_exp(-gate[i])) * up[i];
}

}  // namespace
}  // namespace qcompile
