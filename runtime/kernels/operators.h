// The operators of domain `qcompile` as ONNX Runtime calls them.
#pragma once

#include <vector>

#include "ort_api.h"

namespace qcompile {

// One operator for one combination of element types and one execution provider.
struct Operator : ort::OrtCustomOp {
  const ort::OrtApi* api;
  const char* name;
  int bits;                                 // of w: 4 or 8
  bool bias;                                // the Add of the name
  ort::ONNXTensorElementDataType element;   // x, scale, bias and the output: fp32, fp16 or bf16
  bool is_signed;                           // w and zero_point are int4 / int8 instead of uint4 / uint8
};

// Those of the CPU provider, for one ONNX Runtime. cuda/operators.h has those of the CUDA provider.
std::vector<Operator> operators(const ort::OrtApi& api);

}  // namespace qcompile
