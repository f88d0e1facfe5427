// The operators on the CPU: from ONNX Runtime's nodes to PackedWeight, which is packed once where w is constant.

#include "operators.h"

#include "custom_op.h"
#include "matmul.h"
#include "pool.h"

namespace qcompile {
namespace {

using namespace ort;

// ---- One node

class Kernel : public Node {
 public:
  Kernel(const Operator& op, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  // What is made of w, scale and zero_point, once where they are constant.
  struct Weight {
    PackedWeight packed;
    PanelBits bits;
  };
  std::unique_ptr<const Weight> pack_weight(const Given& given) const;
  void multiply(const Weight& weight, const OrtValue* x, const OrtValue* bias, OrtKernelContext* context) const;

  const Kernels* kernels_;
  bool checked_bias_ = false;             // its shape was known at load
  std::unique_ptr<const Weight> weight_;  // empty where w, scale or zero_point is no constant
};

Kernel::Kernel(const Operator& op, const OrtKernelInfo* info) : Node(op, info), kernels_(chosen_kernels()) {
  if (!kernels_ || !kernels_->products.of[op.format].multiply) {
    refuse("QCOMPILE_KERNEL was changed since the library was registered: it may be %s", kernel_names());
  }
  const Given given = given_at_load(info);
  check_shapes(given);
  checked_bias_ = given.value[kBias] != nullptr;
  for (Input input : kWeightInputs) {
    if (given.present[input] && !given.value[input]) return;
  }
  weight_ = pack_weight(given);
  give_back(given);
}

std::unique_ptr<const Kernel::Weight> Kernel::pack_weight(const Given& given) const {
  const Shape w = weight_shape(*given.shape[kW]);
  const Source source = this->source(given);
  const Layout layout = make_layout(w[0], w[1], block_size(), op().format, source);
  const PanelBits bits(layout, activation_bits(), columns_at_8());
  return std::unique_ptr<const Weight>(new Weight{PackedWeight(layout, source, kernels_), bits});
}

void Kernel::compute(OrtKernelContext* context) const {
  if (!weight_) {
    const Given given = given_at_run(context);
    check_shapes(given);
    multiply(*pack_weight(given), given.value[kX], given.value[kBias], context);
    return;
  }
  const OrtValue* bias = takes(kBias) ? input(context, kBias) : nullptr;
  if (bias && !checked_bias_) check_bias(bias, weight_->packed.layout().k, weight_->packed.layout().n);
  multiply(*weight_, input(context, kX), bias, context);
}

void Kernel::multiply(const Weight& weight, const OrtValue* x, const OrtValue* bias, OrtKernelContext* context) const {
  const Layout& layout = weight.packed.layout();
  const Output y = output(context, x, layout.k, layout.n);
  if (y.rows == 0) return;
  Pool pool{api(), context};
  weight.packed.multiply(data_of(api(), x), element_bytes() == 2 ? Element::kHalf : Element::kFloat, y.rows,
                         data_of(api(), y.value), bias ? data_of(api(), bias) : nullptr, weight.bits,
                         {Pool::run, &pool});
}

}  // namespace

std::vector<Operator> operators(const OrtApi& api) {
  const Kernels* kernels = chosen_kernels();
  std::vector<Operator> all =
      all_operators(api, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                    [&](int format) { return kernels && kernels->products.of[format].multiply; });
  for (Operator& op : all) {
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    run_with<Kernel>(op);
  }
  return all;
}

}  // namespace qcompile
