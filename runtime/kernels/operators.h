// The operators of domain `qcompile` as ONNX Runtime calls them.
#pragma once

#include <vector>

#include "ort_api.h"

namespace qcompile {

// One operator for one combination of element types.
struct Operator : ort::OrtCustomOp {
  const ort::OrtApi* api;
  const char* name;
  int bits;         // of w: 4 or 8
  bool bias;        // the Add of the name
  bool half;        // x, scale, bias and the output are fp16 instead of fp32
  bool is_signed;   // w and zero_point are int4 / int8 instead of uint4 / uint8
};

// All of them, for one ONNX Runtime.
std::vector<Operator> operators(const ort::OrtApi& api);

}  // namespace qcompile
