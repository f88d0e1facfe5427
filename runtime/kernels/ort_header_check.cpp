// Compares ort_api.h with the official header: cmake -DQCOMPILE_ORT_INCLUDE=<folder of onnxruntime_c_api.h>

#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ort_api.h"

#define SLOT(name) \
  static_assert(offsetof(::OrtApi, name) == qcompile::ort::name::kIndex * sizeof(void*), #name " has another slot")
#define FIELD(name)                                                                                 \
  static_assert(offsetof(::OrtCustomOp, name) == offsetof(qcompile::ort::OrtCustomOp, name) &&      \
                    sizeof(::OrtCustomOp::name) == sizeof(qcompile::ort::OrtCustomOp::name),        \
                #name " lies elsewhere in OrtCustomOp")
#define VALUE(name) static_assert(int(::name) == int(qcompile::ort::name), #name " has another value")

SLOT(CreateStatus);
SLOT(CreateCustomOpDomain);
SLOT(CustomOpDomain_Add);
SLOT(AddCustomOpDomain);
SLOT(GetTensorMutableData);
SLOT(CastTypeInfoToTensorInfo);
SLOT(CreateTensorTypeAndShapeInfo);
SLOT(SetTensorElementType);
SLOT(SetDimensions);
SLOT(GetTensorElementType);
SLOT(GetDimensionsCount);
SLOT(GetDimensions);
SLOT(GetSymbolicDimensions);
SLOT(GetTensorTypeAndShape);
SLOT(AllocatorAlloc);
SLOT(AllocatorFree);
SLOT(KernelInfoGetAttribute_float);
SLOT(KernelInfoGetAttribute_int64);
SLOT(KernelInfoGetAttribute_string);
SLOT(KernelContext_GetInputCount);
SLOT(KernelContext_GetInput);
SLOT(KernelContext_GetOutput);
SLOT(ReleaseStatus);
SLOT(ReleaseTypeInfo);
SLOT(ReleaseTensorTypeAndShapeInfo);
SLOT(ReleaseAllocator);
SLOT(KernelInfoGetAttributeArray_int64);
SLOT(KernelContext_GetGPUComputeStream);
SLOT(GetTensorMemoryInfo);
SLOT(MemoryInfoGetDeviceType);
SLOT(KernelInfo_GetInputCount);
SLOT(KernelInfo_GetInputTypeInfo);
SLOT(KernelInfo_GetNodeName);
SLOT(KernelInfoGetConstantInput_tensor);
SLOT(KernelContext_GetAllocator);
SLOT(ShapeInferContext_GetInputTypeShape);
SLOT(ShapeInferContext_SetOutputTypeShape);
SLOT(SetSymbolicDimensions);
SLOT(KernelContext_ParallelFor);
SLOT(KernelContext_GetScratchBuffer);

FIELD(version);
FIELD(CreateKernel);
FIELD(GetName);
FIELD(GetExecutionProviderType);
FIELD(GetInputType);
FIELD(GetInputTypeCount);
FIELD(GetOutputType);
FIELD(GetOutputTypeCount);
FIELD(KernelCompute);
FIELD(KernelDestroy);
FIELD(GetInputCharacteristic);
FIELD(GetOutputCharacteristic);
FIELD(GetInputMemoryType);
FIELD(GetVariadicInputMinArity);
FIELD(GetVariadicInputHomogeneity);
FIELD(GetVariadicOutputMinArity);
FIELD(GetVariadicOutputHomogeneity);
FIELD(CreateKernelV2);
FIELD(KernelComputeV2);
FIELD(InferOutputShapeFn);
FIELD(GetStartVersion);
FIELD(GetEndVersion);
FIELD(GetMayInplace);
FIELD(ReleaseMayInplace);
FIELD(GetAliasMap);
FIELD(ReleaseAliasMap);
static_assert(sizeof(::OrtCustomOp) >= sizeof(qcompile::ort::OrtCustomOp), "OrtCustomOp has lost fields");

VALUE(ORT_FAIL);
VALUE(ORT_INVALID_ARGUMENT);
VALUE(ORT_INVALID_GRAPH);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4);
VALUE(INPUT_OUTPUT_REQUIRED);
VALUE(INPUT_OUTPUT_OPTIONAL);
VALUE(OrtMemTypeCPUInput);
VALUE(OrtMemTypeDefault);
VALUE(OrtMemoryInfoDeviceType_CPU);

static_assert(offsetof(::OrtApiBase, GetApi) == offsetof(qcompile::ort::OrtApiBase, GetApi), "GetApi lies elsewhere");
static_assert(ORT_API_VERSION >= qcompile::ort::kApiVersion, "this header is older than the library asks for");
