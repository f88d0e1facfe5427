// What operators that pack nothing have in common: inputs, outputs, attributes, work for several threads.
#pragma once

#include <cstdio>
#include <string>
#include <utility>

#include "c_api.h"
#include "custom_op.h"
#include "pool.h"

namespace qcompile {
namespace {

using namespace ort;

constexpr int64_t kSmall = 1 << 14;  // numbers that one thread computes sooner than it finds others

template <typename... Values>
[[noreturn]] void refuse(const LightOperator& op, const char* format, Values... values) {
  char what[512];
  std::snprintf(what, sizeof what, format, values...);
  throw Refusal(op.name + ": " + what);
}

inline const OrtValue* input(const LightOperator& op, const OrtKernelContext* context, size_t index) {
  const OrtValue* value;
  check(op.api->call<KernelContext_GetInput>(context, index, &value));
  return value;
}

inline void* output(const LightOperator& op, OrtKernelContext* context, const Shape& shape, size_t index = 0) {
  OrtValue* y;
  check(op.api->call<KernelContext_GetOutput>(context, index, shape.dims.data(), shape.rank, &y));
  return data_of(*op.api, y);
}

inline int64_t product(const Shape& shape, size_t rank) {
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= shape[i];
  return count;
}

// Nodes of this version say none (docs/deploy.md).
inline void check_attributes(const LightOperator& op, const OrtKernelInfo* info) {
  int64_t version = 1;
  if (OrtStatus* absent = op.api->call<KernelInfoGetAttribute_int64>(info, "version", &version)) {
    op.api->call<ReleaseStatus>(absent);
    return;
  }
  check_version(op.name + ": ", version);
}

// piece(i) for all i below total: on the threads of ONNX Runtime where it is work for several.
template <typename Piece>
void for_all(const LightOperator& op, OrtKernelContext* context, int64_t total, int64_t numbers, const Piece& piece) {
  if (total <= 1 || numbers < kSmall) {
    for (int64_t i = 0; i < total; ++i) piece(i);
    return;
  }
  Pool pool{*op.api, context};
  const auto run = [](void* data, size_t i) { (*static_cast<const Piece*>(data))(int64_t(i)); };
  Pool::run(&pool, +run, size_t(total), const_cast<Piece*>(&piece));
}

inline OrtTensorTypeAndShapeInfo* input_info(const OrtApi& api, OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info;  // the context owns it
  check(api.call<ShapeInferContext_GetInputTypeShape>(context, index, &info));
  return info;
}

inline LightOperator make(const OrtApi& api, std::string name, ONNXTensorElementDataType element) {
  LightOperator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return static_cast<const LightOperator*>(op)->name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return static_cast<const LightOperator*>(op)->element; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return kOperatorVersion; };
  op.api = &api;
  op.name = std::move(name);
  op.element = element;
  return op;
}

}  // namespace
}  // namespace qcompile
