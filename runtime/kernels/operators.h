// The operators of domain `qcompile` as ONNX Runtime calls them.
#pragma once

#include <string>
#include <vector>

#include "formats.h"
#include "ort_api.h"

namespace qcompile {

// One operator for one combination of element types and one execution provider.
struct Operator : ort::OrtCustomOp {
  const ort::OrtApi* api;
  std::string name;
  int format;                               // of w: a row of kFormats
  bool bias;                                // the Add of the name
  ort::ONNXTensorElementDataType element;   // x, scale, bias and the output: fp32, fp16 or bf16
  bool is_signed;                           // w and zero_point are int4 / int8 instead of uint4 / uint8

  const Format& of() const { return kFormats[format]; }
};

// Those of the CPU provider, for one ONNX Runtime. cuda/operators.h has those of the CUDA provider.
std::vector<Operator> operators(const ort::OrtApi& api);

}  // namespace qcompile
