// The operators of domain `qcompile` for ONNX Runtime's CUDA provider. Unverified on GPU.
#pragma once

#include <vector>

#include "../operators.h"

namespace qcompile::cuda {

// MatMulInt4, MatMulInt8, MatMulAddInt4 and MatMulAddInt8 of fp16, bf16 and fp32, for one ONNX Runtime. They differ from
// those of the CPU provider in that w, scale and zero_point must be constants of the model, and that activation_bits
// changes nothing: products are of fp16 or bf16 numbers with fp32 sums, those of fp32 inputs are of fp16 numbers.
std::vector<Operator> cuda_operators(const ort::OrtApi& api);

}  // namespace qcompile::cuda
