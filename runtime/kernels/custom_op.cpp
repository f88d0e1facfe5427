#include "custom_op.h"

#include <atomic>

#include "c_api.h"

namespace qcompile {

using namespace ort;

namespace {

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

size_t input_count(const OrtCustomOp* op) { return size_t(3 + self(op).bias + self(op).of().zeros()); }

ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  const Operator& mine = self(op);
  const Input input = input_at(mine, index);
  if (input == kScale && mine.of().byte_scales()) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  if (input != kW && input != kZeroPoint) return mine.element;
  if (mine.of().bits == 4 && !mine.of().in_fields()) return mine.is_signed ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4;
  return mine.is_signed ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

// (…, K) and (K, N) -> (…, N), with the names of unknown dimensions. ONNX Runtime calls the function of the first
// operator of a name for all of its element types and providers, so the type comes from input 0. It finds the type by
// itself where this gives up.
OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi& api = *self(op).api;
  return guarded(api, [&] {
    OrtTensorTypeAndShapeInfo *x_info, *w_info;  // the context owns them
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kX), &x_info));
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kW), &w_info));
    Shape y = shape_of(api, x_info);
    const Shape w = shape_of(api, w_info);
    if (y.rank == 0 || w.rank != 2 || w[1] < 0) return;
    y.dims[y.rank - 1] = w[1];
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(x_info, &type));
    infer_output(api, context, x_info, y.rank - 1, y, type);
  });
}

Operator make(const OrtApi& api, int format, bool bias, ONNXTensorElementDataType element, bool is_signed) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name.c_str(); };
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).element; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return input_at(self(op), index) == kZeroPoint ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return kOperatorVersion; };
  op.api = &api;
  op.name = std::string(bias ? "MatMulAdd" : "MatMul") + kFormats[format].word;
  op.format = format;
  op.bias = bias;
  op.element = element;
  op.is_signed = is_signed;
  return op;
}

}  // namespace

void infer_output(const OrtApi& api, OrtShapeInferContext* context, const OrtTensorTypeAndShapeInfo* like, size_t kept,
                  Shape y, ONNXTensorElementDataType type, size_t index) {
  std::array<const char*, kMaxRank> names{};
  if (kept > 0) check(api.call<GetSymbolicDimensions>(like, names.data(), shape_of(api, like).rank));
  std::vector<std::string> made(y.rank);
  for (size_t i = 0; i < y.rank; ++i) {
    if (i >= kept) names[i] = "";
    if (y[i] >= 0 || *names[i]) continue;  // without a name, −1 would be taken for a size, equal to any other −1
    static std::atomic<unsigned> count{0};
    made[i] = "qcompile_" + std::to_string(count++);
    names[i] = made[i].c_str();
  }
  OrtTensorTypeAndShapeInfo* info;
  check(api.call<CreateTensorTypeAndShapeInfo>(&info));
  const InfoOwner owner = own(api, info);
  check(api.call<SetTensorElementType>(info, type));
  check(api.call<SetDimensions>(info, y.dims.data(), y.rank));
  check(api.call<SetSymbolicDimensions>(info, names.data(), y.rank));
  check(api.call<ShapeInferContext_SetOutputTypeShape>(context, index, info));
}

Input input_at(const Operator& op, size_t index) { return !op.bias && index == kBias ? kZeroPoint : Input(index); }

std::vector<Operator> all_operators(const OrtApi& api, std::initializer_list<ONNXTensorElementDataType> elements,
                                    const std::function<bool(int format)>& has_kernel) {
  std::vector<Operator> all;
  for (int format = 0; format < kFormatCount; ++format) {
    if (!has_kernel(format)) continue;
    for (ONNXTensorElementDataType element : elements) {
      for (bool is_signed : {false, true}) {
        if (is_signed && (!kFormats[format].zeros() || kFormats[format].base() >= 0)) continue;
        for (bool bias : {false, true}) all.push_back(make(api, format, bias, element, is_signed));
      }
    }
  }
  return all;
}

}  // namespace qcompile
