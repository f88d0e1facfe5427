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

// One that packs nothing when it is loaded (light.cpp, attention_op.cpp).
struct LightOperator : ort::OrtCustomOp {
  const ort::OrtApi* api;
  std::string name;
  int format;                              // of the table that it reads: a row of kFormats
  ort::ONNXTensorElementDataType element;  // of what it computes: fp32 or fp16
  ort::ONNXTensorElementDataType index;    // of what it looks up: int32 or int64
  bool is_signed;                          // w and zero_point are int8 instead of uint8
  ort::ONNXTensorElementDataType cache;    // of attention's caches: fp32, fp16 or int8
};

// SwiGLU and EmbeddingF of the CPU provider, the only ones there are, for one ONNX Runtime.
std::vector<LightOperator> light_operators(const ort::OrtApi& api);

// GroupQueryAttention of the CPU provider (attention_op.cpp).
std::vector<LightOperator> attention_operators(const ort::OrtApi& api);

// Those of the CPU provider, for one ONNX Runtime. cuda/operators.h has those of the CUDA provider.
std::vector<Operator> operators(const ort::OrtApi& api);

}  // namespace qcompile
