// A library of one custom operator, as people bring them: example.ops::Squash, y = x / (1 + |x|) in float.
#include <cmath>

#include "ort_api.h"

namespace {
using namespace qcompile::ort;

struct Squash : OrtCustomOp {
  const OrtApi* api;
};

struct Kernel {
  const OrtApi* api;
};

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const OrtApi& api = *static_cast<Kernel*>(kernel)->api;
  const OrtValue* x;
  if (OrtStatus* status = api.call<KernelContext_GetInput>(context, size_t{0}, &x)) return status;
  OrtTensorTypeAndShapeInfo* info;
  if (OrtStatus* status = api.call<GetTensorTypeAndShape>(x, &info)) return status;
  size_t rank;
  int64_t dims[8], count = 1;
  if (OrtStatus* status = api.call<GetDimensionsCount>(info, &rank)) return status;
  if (OrtStatus* status = api.call<GetDimensions>(info, dims, rank)) return status;
  api.call<ReleaseTensorTypeAndShapeInfo>(info);
  for (size_t i = 0; i < rank; ++i) count *= dims[i];
  OrtValue* y;
  if (OrtStatus* status = api.call<KernelContext_GetOutput>(context, size_t{0}, dims, rank, &y)) return status;
  void *from, *to;
  if (OrtStatus* status = api.call<GetTensorMutableData>(const_cast<OrtValue*>(x), &from)) return status;
  if (OrtStatus* status = api.call<GetTensorMutableData>(y, &to)) return status;
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float*>(from)[i];
    static_cast<float*>(to)[i] = value / (1 + std::fabs(value));
  }
  return nullptr;
}

Squash make(const OrtApi* api) {
  Squash op{};
  op.version = kApiVersion;
  op.api = api;
  op.GetName = [](const OrtCustomOp*) { return "Squash"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputType = op.GetInputType;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo*, void** kernel) {
    *kernel = new Kernel{static_cast<const Squash*>(self)->api};
    return static_cast<OrtStatus*>(nullptr);
  };
  op.KernelComputeV2 = compute;
  op.GetStartVersion = op.GetVariadicInputMinArity;
  op.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  return op;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  static Squash op = make(api);
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    if (OrtStatus* status = api->call<CreateCustomOpDomain>("example.ops", &domain)) return status;
    if (OrtStatus* status = api->call<CustomOpDomain_Add>(domain, &op)) return status;
  }
  return api->call<AddCustomOpDomain>(options, domain);
}
