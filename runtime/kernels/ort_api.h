// The slice of ONNX Runtime's C API that the operators use: no package brings its headers.
//
// OrtApi is a table of function pointers whose slots never move, so a slot number and a signature declare a function.
// tests/runtime/test_ort_api.py compares the numbers with the list of all slots; ort_header_check.cpp compares them, and the
// layout of OrtCustomOp, with the official header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define QCOMPILE_ORT_CALL __stdcall
#else
#define QCOMPILE_ORT_CALL
#endif

namespace qcompile::ort {

// The version of the table that is asked for. Every ONNX Runtime from 1.20 on has it.
constexpr uint32_t kApiVersion = 20;

struct OrtStatus;  // nullptr: success
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtSessionOptions;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtCustomOp;

enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_INVALID_GRAPH = 10 };

enum ONNXTensorElementDataType : int {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4 = 21,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 = 22,
};

enum OrtCustomOpInputOutputCharacteristic : int { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };

// CPUInput: in host memory, for an operator of another provider.
enum OrtMemType : int { OrtMemTypeCPUInput = -2, OrtMemTypeDefault = 0 };

enum OrtMemoryInfoDeviceType : int { OrtMemoryInfoDeviceType_CPU = 0 };

template <typename Signature>
struct Pointer;
template <typename Result, typename... Parameters>
struct Pointer<Result(Parameters...)> {
  using Type = Result(QCOMPILE_ORT_CALL*)(Parameters...);
};

template <size_t index, typename Signature>
struct Slot {
  static constexpr size_t kIndex = index;
  using Function = typename Pointer<Signature>::Type;
};

using CreateStatus = Slot<0, OrtStatus*(OrtErrorCode, const char* message)>;
using CreateCustomOpDomain = Slot<26, OrtStatus*(const char* domain, OrtCustomOpDomain** out)>;
using CustomOpDomain_Add = Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Slot<51, OrtStatus*(OrtValue*, void** out)>;
using CastTypeInfoToTensorInfo = Slot<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo** out)>;
using CreateTensorTypeAndShapeInfo = Slot<57, OrtStatus*(OrtTensorTypeAndShapeInfo** out)>;
using SetTensorElementType = Slot<58, OrtStatus*(OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType)>;
using SetDimensions = Slot<59, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t count)>;
using GetTensorElementType = Slot<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType* out)>;
using GetDimensionsCount = Slot<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)>;
using GetDimensions = Slot<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count)>;
using GetSymbolicDimensions =
    Slot<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t count)>;
using GetTensorTypeAndShape = Slot<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** out)>;
using AllocatorAlloc = Slot<75, OrtStatus*(OrtAllocator*, size_t bytes, void** out)>;
using AllocatorFree = Slot<76, OrtStatus*(OrtAllocator*, void*)>;
using KernelInfoGetAttribute_float = Slot<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)>;
using KernelInfoGetAttribute_int64 = Slot<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)>;
using KernelInfoGetAttribute_string =
    Slot<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size)>;
using KernelContext_GetInputCount = Slot<88, OrtStatus*(const OrtKernelContext*, size_t* out)>;
using KernelContext_GetInput = Slot<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)>;
using KernelContext_GetOutput =
    Slot<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue** out)>;
using ReleaseStatus = Slot<93, void(OrtStatus*)>;
using ReleaseTypeInfo = Slot<98, void(OrtTypeInfo*)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(OrtTensorTypeAndShapeInfo*)>;
using ReleaseAllocator = Slot<132, void(OrtAllocator*)>;
// With out = nullptr it tells the size alone.
using KernelInfoGetAttributeArray_int64 =
    Slot<163, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out, size_t* size)>;
using KernelContext_GetGPUComputeStream = Slot<193, OrtStatus*(const OrtKernelContext*, void** out)>;
using GetTensorMemoryInfo = Slot<194, OrtStatus*(const OrtValue*, const OrtMemoryInfo** out)>;  // the tensor owns it
using MemoryInfoGetDeviceType = Slot<225, void(const OrtMemoryInfo*, OrtMemoryInfoDeviceType* out)>;
using KernelInfo_GetInputCount = Slot<230, OrtStatus*(const OrtKernelInfo*, size_t* out)>;
using KernelInfo_GetInputTypeInfo = Slot<234, OrtStatus*(const OrtKernelInfo*, size_t index, OrtTypeInfo** out)>;
using KernelInfo_GetNodeName = Slot<244, OrtStatus*(const OrtKernelInfo*, char* out, size_t* size)>;
using KernelInfoGetConstantInput_tensor =
    Slot<249, OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue** out)>;
// The allocator is the caller's, to be released.
using KernelContext_GetAllocator =
    Slot<253, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator** out)>;
using ShapeInferContext_GetInputTypeShape =
    Slot<268, OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out)>;
using ShapeInferContext_SetOutputTypeShape =
    Slot<270, OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*)>;
using SetSymbolicDimensions = Slot<271, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, size_t count)>;
using KernelContext_ParallelFor =
    Slot<274, OrtStatus*(const OrtKernelContext*, void (*piece)(void* data, size_t index), size_t total,
                         size_t num_batch, void* data)>;
// Memory for work on the context's stream. The caller frees it by the allocator of KernelContext_GetAllocator, on the
// host as soon as that work is queued: only the same stream gets it again at once. The context must have a stream.
using KernelContext_GetScratchBuffer =
    Slot<277, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void** out)>;

struct OrtApi {
  void (*slots[1])();  // in truth as many as the version has

  template <typename Slot>
  typename Slot::Function function() const {
    return reinterpret_cast<typename Slot::Function>(slots[Slot::kIndex]);
  }

  // call<GetDimensions>(info, dims, count)
  template <typename Slot, typename... Arguments>
  auto call(Arguments... arguments) const {
    return function<Slot>()(arguments...);
  }
};

struct OrtApiBase {
  Pointer<const OrtApi*(uint32_t version)>::Type GetApi;  // nullptr where the library is older than that
  Pointer<const char*()>::Type GetVersionString;
};

// One operator for one combination of element types. All functions must be given unless marked.
struct OrtCustomOp {
  template <typename Signature>
  using Function = typename Pointer<Signature>::Type;

  uint32_t version;  // kApiVersion: fields of later versions are not read
  Function<void*(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*)> CreateKernel;  // not with CreateKernelV2
  Function<const char*(const OrtCustomOp*)> GetName;
  Function<const char*(const OrtCustomOp*)> GetExecutionProviderType;
  Function<ONNXTensorElementDataType(const OrtCustomOp*, size_t index)> GetInputType;
  Function<size_t(const OrtCustomOp*)> GetInputTypeCount;
  Function<ONNXTensorElementDataType(const OrtCustomOp*, size_t index)> GetOutputType;
  Function<size_t(const OrtCustomOp*)> GetOutputTypeCount;
  Function<void(void* kernel, OrtKernelContext*)> KernelCompute;  // not with KernelComputeV2
  Function<void(void* kernel)> KernelDestroy;
  Function<OrtCustomOpInputOutputCharacteristic(const OrtCustomOp*, size_t index)> GetInputCharacteristic;
  Function<OrtCustomOpInputOutputCharacteristic(const OrtCustomOp*, size_t index)> GetOutputCharacteristic;
  Function<OrtMemType(const OrtCustomOp*, size_t index)> GetInputMemoryType;
  Function<int(const OrtCustomOp*)> GetVariadicInputMinArity;
  Function<int(const OrtCustomOp*)> GetVariadicInputHomogeneity;
  Function<int(const OrtCustomOp*)> GetVariadicOutputMinArity;
  Function<int(const OrtCustomOp*)> GetVariadicOutputHomogeneity;
  Function<OrtStatus*(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel)> CreateKernelV2;
  Function<OrtStatus*(void* kernel, OrtKernelContext*)> KernelComputeV2;
  Function<OrtStatus*(const OrtCustomOp*, OrtShapeInferContext*)> InferOutputShapeFn;
  Function<int(const OrtCustomOp*)> GetStartVersion;
  Function<int(const OrtCustomOp*)> GetEndVersion;
  Function<size_t(int** input_index, int** output_index)> GetMayInplace;       // optional
  Function<void(int* input_index, int* output_index)> ReleaseMayInplace;       // optional
  Function<size_t(int** input_index, int** output_index)> GetAliasMap;         // optional
  Function<void(int* input_index, int* output_index)> ReleaseAliasMap;         // optional
};
static_assert(sizeof(void*) == 8 && sizeof(OrtCustomOp) == 26 * sizeof(void*), "OrtCustomOp is 26 words");

}  // namespace qcompile::ort
