// Blocks of channels turned by a Hadamard matrix with signs, by the fast Walsh-Hadamard transform.
//
// Included by reference.cpp and the files of one instruction set each, and compiled with the flags of each. Everything is in
// an unnamed namespace, so that no copy of a function is offered to the linker for files of another one.
#pragma once

#include <cstdint>
#include <cstring>

namespace qcompile {
namespace {

constexpr int kTurned = 8;  // floats of a vector; two registers of SSE or NEON
typedef float Turned __attribute__((vector_size(4 * kTurned)));
typedef int32_t TurnedLanes __attribute__((vector_size(4 * kTurned)));

// v[i] -> v[i] + v[i + kStep], v[i + kStep] -> v[i] - v[i + kStep], for every i without that bit.
template <int kStep>
inline void turn_lanes(Turned& v) {
  Turned other, sign;
#ifdef __clang__
  other = __builtin_shufflevector(v, v, 0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep, 7 ^ kStep);
#else
  const TurnedLanes lanes = {0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep, 7 ^ kStep};
  other = __builtin_shuffle(v, lanes);
#endif
  for (int i = 0; i < kTurned; ++i) sign[i] = i & kStep ? -1.0f : 1.0f;
  v = v * sign + other;
}

// y = (x * signs) H for a block of 8 kVectors numbers, H of Sylvester's construction.
template <int kVectors>
inline void turn_block(const float* x, const float* signs, float* y) {
  Turned v[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    Turned sign;
    std::memcpy(&v[i], x + i * kTurned, sizeof sign);
    std::memcpy(&sign, signs + i * kTurned, sizeof sign);
    v[i] *= sign;
    turn_lanes<1>(v[i]);
    turn_lanes<2>(v[i]);
    turn_lanes<4>(v[i]);
  }
  for (int step = 1; step < kVectors; step *= 2) {
    for (int i = 0; i < kVectors; ++i) {
      if (i & step) continue;
      const Turned a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
  }
  std::memcpy(y, v, sizeof v);
}

// y = x M for each block of x (n,), n a multiple of block; M = diag(signs) H, signs (block,) of any size.
void hadamard(const float* x, const float* signs, float* y, int64_t n, int64_t block) {
  for (int64_t begin = 0; begin < n; begin += block) {
    if (block == 64) {
      turn_block<8>(x + begin, signs, y + begin);
    } else if (block == 32) {
      turn_block<4>(x + begin, signs, y + begin);
    } else {
      turn_block<2>(x + begin, signs, y + begin);
    }
  }
}

}  // namespace
}  // namespace qcompile
