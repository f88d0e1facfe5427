// From ONNX Runtime's nodes to DeviceWeight: packed and copied to the device once, multiplied on the stream of the run.

#include "operators.h"

#include <memory>
#include <stdexcept>
#include <vector>

#include "../custom_op.h"
#include "weight.h"

namespace qcompile::cuda {
namespace {

using namespace ort;

Element element_of(const Operator& op) {
  switch (op.element) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Element::kHalf;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return Element::kBfloat16;
    default: return Element::kFloat;
  }
}

const OrtMemoryInfo* memory_of(const OrtApi& api, const OrtValue* value) {
  const OrtMemoryInfo* memory;
  check(api.call<GetTensorMemoryInfo>(value, &memory));
  return memory;
}

bool on_host(const OrtApi& api, const OrtValue* value) {
  OrtMemoryInfoDeviceType device;
  api.call<MemoryInfoGetDeviceType>(memory_of(api, value), &device);
  return device == OrtMemoryInfoDeviceType_CPU;
}

// Device memory for the time of one product, from the session's arena of the memory that `near` lies in. It goes back
// when the kernels are queued, not when they have run: the arena gives it at once to the same stream only, where what
// comes next runs behind them.
class Scratch {
 public:
  Scratch(const OrtApi& api, const OrtKernelContext* context, const OrtValue* near, cudaStream_t stream)
      : api_(api), context_(context), near_(near), stream_(stream) {}

  ~Scratch() {
    for (void* memory : taken_) release(api_.call<AllocatorFree>(allocator_, memory));
    if (allocator_) api_.call<ReleaseAllocator>(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* take(size_t bytes) {
    const OrtMemoryInfo* info = memory_of(api_, near_);
    if (!allocator_) check(api_.call<KernelContext_GetAllocator>(context_, info, &allocator_));
    taken_.reserve(taken_.size() + 1);  // nothing may be thrown between taking memory and noting it
    void* memory;
    if (stream_) {
      check(api_.call<KernelContext_GetScratchBuffer>(context_, info, bytes, &memory));
    } else {  // the default stream looks like none, and ONNX Runtime crashes where it is none
      check(api_.call<AllocatorAlloc>(allocator_, bytes, &memory));
    }
    if (!memory) throw std::bad_alloc();
    taken_.push_back(memory);
    return memory;
  }

 private:
  void release(OrtStatus* status) {
    if (status) api_.call<ReleaseStatus>(status);
  }

  const OrtApi& api_;
  const OrtKernelContext* context_;
  const OrtValue* near_;
  cudaStream_t stream_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> taken_;
};

class Kernel : public Node {
 public:
  Kernel(const Operator& op, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  std::unique_ptr<const DeviceWeight> make_weight(const Given& given) const;
  void give_back_host(const Given& given) const;
  // Adds the node to what CUDA says.
  template <typename Body>
  auto named(const Body& body) const {
    try {
      return body();
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(label() + error.what());
    }
  }

  bool checked_bias_;  // its shape was known at load
  std::unique_ptr<const DeviceWeight> weight_;
};

// Inputs of CPU memory are on the host while kernels are made; DeviceWeight would copy them from a device, too.
Kernel::Kernel(const Operator& op, const OrtKernelInfo* info) : Node(op, info) {
  const Given given = given_at_load(info);
  check_shapes(given);
  checked_bias_ = given.value[kBias] != nullptr;
  for (Input input : kWeightInputs) {
    if (given.present[input] && !given.value[input]) {
      refuse("%s is no constant of the model, which the CUDA kernels need: make it an initializer that is no input, "
             "or load the model without the library", name_of(input));
    }
  }
  weight_ = named([&] { return make_weight(given); });
  give_back_host(given);
}

std::unique_ptr<const DeviceWeight> Kernel::make_weight(const Given& given) const {
  const Shape& w = *given.shape[kW];
  const Layout layout = make_layout(w[0], w[1], block_size(), op().of().bits, element_of(op()));
  return std::make_unique<const DeviceWeight>(layout, source(given));
}

// What lies on the host, as pages of the model's file, is not read again.
void Kernel::give_back_host(const Given& given) const {
  Given host;
  for (Input input : kWeightInputs) {
    if (!given.value[input] || !on_host(api(), given.value[input])) continue;
    host.value[input] = given.value[input];
    host.shape[input] = given.shape[input];
  }
  give_back(host);
}

void Kernel::compute(OrtKernelContext* context) const {
  const Layout& layout = weight_->layout();
  const OrtValue* x = input(context, kX);
  const OrtValue* bias = takes(kBias) ? input(context, kBias) : nullptr;
  if (bias && !checked_bias_) check_bias(bias, layout.k, layout.n);
  const Output y = output(context, x, layout.k, layout.n);
  if (y.rows == 0) return;
  void* stream = nullptr;
  check(api().call<KernelContext_GetGPUComputeStream>(context, &stream));
  Scratch scratch(api(), context, x, cudaStream_t(stream));
  const Call call = {cudaStream_t(stream), [&](size_t bytes) { return scratch.take(bytes); }};
  named([&] {
    weight_->multiply(data_of(api(), x), y.rows, data_of(api(), y.value), bias ? data_of(api(), bias) : nullptr, call);
  });
}

}  // namespace

std::vector<Operator> cuda_operators(const OrtApi& api) {
  std::vector<Operator> all =
      all_operators(api, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                          ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
                    // codes are numbers of 4 or 8 bits: n - z in dequant.h
                    [](int format) { return kFormats[format].zeros() && kFormats[format].base() < 0; });
  for (Operator& op : all) {
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
    op.GetInputMemoryType = [](const OrtCustomOp* op, size_t index) {
      const Input input = input_at(*static_cast<const Operator*>(op), index);
      return input == kX || input == kBias ? OrtMemTypeDefault : OrtMemTypeCPUInput;
    };
    run_with<Kernel>(op);
  }
  return all;
}

}  // namespace qcompile::cuda
