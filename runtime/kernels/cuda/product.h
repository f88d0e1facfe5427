// One product as every kernel gets it: no more than pointers and sizes, for host code with and without CUDA's headers.
#pragma once

#include <cstdint>

#include "layout.h"

namespace qcompile::cuda {

// One product on the device. Pointers are device pointers; x, bias and y are of layout.element unless said otherwise.
struct Product {
  Layout layout;
  const void *codes, *scales, *zeros;
  const void* x;            // (m, padded_k): fp16, or bf16 for kBfloat16; rows `x_stride` elements apart (a multiple of 8)
  int64_t x_stride;
  int64_t m;
  void* y;                  // (m, n)
  const void* bias;         // (n,), or nullptr
  const float* row_factor;  // (m,), by which row sums are multiplied (kFloat), or nullptr
  float* partials;          // (split, grid_m * tokens, padded_n) fp32 where plan.split > 1
  uint32_t* counters;       // plan.counters zeros; they are zeros again behind the kernel
};

}  // namespace qcompile::cuda
