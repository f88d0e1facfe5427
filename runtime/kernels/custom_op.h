// What ONNX Runtime asks of an operator before it makes a kernel: names, types, shapes. The same for every provider.
#pragma once

#include <functional>
#include <initializer_list>
#include <vector>

#include "node.h"

namespace qcompile {

// The products of every format that `has_kernel`, with a bias and without, for these elements and all types of codes.
// What depends on the provider is left to fill in: GetExecutionProviderType, GetInputMemoryType, what run_with fills in.
std::vector<Operator> all_operators(const ort::OrtApi& api,
                                    std::initializer_list<ort::ONNXTensorElementDataType> elements,
                                    const std::function<bool(int format)>& has_kernel);

// Which input the index of one is.
Input input_at(const Operator& op, size_t index);

// Tells the shape of an output: the first `kept` dimensions of y are those of `like`, with their names where they are unknown;
// of others −1 stands for one that is not known.
void infer_output(const ort::OrtApi& api, ort::OrtShapeInferContext* context, const ort::OrtTensorTypeAndShapeInfo* like,
                  size_t kept, Shape y, ort::ONNXTensorElementDataType type, size_t index = 0);

// Has the operator's nodes made and run as `Kernel`: a class with a constructor of (const Op&, const
// OrtKernelInfo*), compute(OrtKernelContext*) const, and api().
template <typename Kernel, typename Op>
void run_with(Op& op) {
  using namespace ort;
  op.CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(*api, [&] { *kernel = new Kernel(*static_cast<const Op*>(op), info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& mine = *static_cast<const Kernel*>(kernel);
    return guarded(mine.api(), [&] { mine.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace qcompile
