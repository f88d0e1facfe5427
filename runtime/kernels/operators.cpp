// From ONNX Runtime's nodes to PackedWeight: checks every input, packs constant weights once, and multiplies.

#include "operators.h"

#include <array>
#include <atomic>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "matmul.h"

namespace qcompile {
namespace {

using namespace ort;

constexpr int64_t kMaxSize = int64_t(1) << 31;  // of K, N and block_size: products of two stay far from overflow
constexpr size_t kMaxRank = 32;

enum Input : size_t { kX, kW, kScale, kBias, kZeroPoint, kInputs };
constexpr const char* kInputNames[kInputs] = {"x", "w", "scale", "bias", "zero_point"};

// ---- Failures. Exceptions inside, an OrtStatus at the border: nothing is thrown through C.

// A status of ONNX Runtime on its way back to it.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

// Bad input: one line that says what is wrong with which node, and what to do.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Body>
OrtStatus* guarded(const OrtApi& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const Refusal& refusal) {
    return api.call<CreateStatus>(ORT_INVALID_ARGUMENT, refusal.what());
  } catch (const std::bad_alloc&) {
    return api.call<CreateStatus>(ORT_FAIL, "qcompile: out of memory");
  } catch (const std::exception& error) {
    return api.call<CreateStatus>(ORT_FAIL, error.what());
  }
}

// ---- Shapes

// Of one tensor; −1 stands for a dimension that is not known yet.
struct Shape {
  std::array<int64_t, kMaxRank> dims{};
  size_t rank = 0;

  int64_t operator[](size_t i) const { return dims[i]; }
  std::string text() const {
    std::string out = "(";
    for (size_t i = 0; i < rank; ++i) {
      out += (i ? ", " : "") + (dims[i] < 0 ? std::string("?") : std::to_string(dims[i]));
    }
    return out + (rank == 1 ? ",)" : ")");
  }
};

// Whether two dimensions cannot be the same.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

using InfoOwner = std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseTensorTypeAndShapeInfo::Function>;

InfoOwner own(const OrtApi& api, OrtTensorTypeAndShapeInfo* info) {
  return {info, api.function<ReleaseTensorTypeAndShapeInfo>()};
}

Shape shape_of(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info) {
  Shape shape;
  check(api.call<GetDimensionsCount>(info, &shape.rank));
  if (shape.rank > kMaxRank) throw Refusal(text("qcompile: a tensor has %zu dimensions, the most is %zu", shape.rank, kMaxRank));
  check(api.call<GetDimensions>(info, shape.dims.data(), shape.rank));
  return shape;
}

Shape shape_of(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info;
  check(api.call<GetTensorTypeAndShape>(value, &info));
  const InfoOwner owner = own(api, info);
  return shape_of(api, info);
}

const void* data_of(const OrtApi& api, const OrtValue* value) {
  void* data;
  check(api.call<GetTensorMutableData>(const_cast<OrtValue*>(value), &data));
  return data;
}

// ---- Memory

// Tells the kernel that the packed copy is what will be read from now on. File-backed pages come back if anyone asks.
void give_back_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page, end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
  (void)data, (void)bytes;
#endif
}

// ---- ONNX Runtime's intra-op pool

struct Pool {
  const OrtApi& api;
  const OrtKernelContext* context;
  void (*piece)(void* data, size_t index) = nullptr;
  void* data = nullptr;
  std::atomic<bool> out_of_memory{false};

  static void run(void* self, void (*piece)(void* data, size_t index), size_t total, void* data) {
    Pool& pool = *static_cast<Pool*>(self);
    pool.piece = piece;
    pool.data = data;
    const auto guarded_piece = [](void* self, size_t index) {
      Pool& pool = *static_cast<Pool*>(self);
      try {
        pool.piece(pool.data, index);
      } catch (const std::bad_alloc&) {
        pool.out_of_memory = true;
      }
    };
    check(pool.api.call<KernelContext_ParallelFor, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>(
        pool.context, guarded_piece, total, 0, self));
    if (pool.out_of_memory) throw std::bad_alloc();
  }
};

// ---- One node

class Kernel {
 public:
  Kernel(const Operator& op, const OrtApi& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  struct Shapes {
    std::optional<Shape> of[kInputs];  // empty: unknown, or the input is absent
  };

  // Position of an input among those of this operator.
  size_t position(Input input) const { return input == kZeroPoint && !op_.bias ? size_t(kBias) : size_t(input); }
  bool takes(Input input) const { return input != kBias || op_.bias; }
  int64_t element_bytes() const { return op_.half ? 2 : 4; }
  int64_t code_bytes(int64_t elements) const { return (elements * op_.bits + 7) / 8; }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Refusal("node '" + node_ + "' (" + op_.name + "): " + what);
  }
  std::string node_name(const OrtKernelInfo* info) const;
  int64_t attribute(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const;
  void check_shapes(const Shapes& shapes) const;
  Layout layout_of(const Shapes& shapes, const Source& source) const;

  const Operator& op_;
  const OrtApi& api_;
  std::string node_;
  int64_t block_size_;
  int activation_bits_;
  std::unique_ptr<const PackedWeight> weight_;  // empty: w, scale or zero_point is no constant
};

Kernel::Kernel(const Operator& op, const OrtApi& api, const OrtKernelInfo* info)
    : op_(op), api_(api), node_(node_name(info)) {
  if (op.too_new) {
    refuse(text("the model needs a newer version of the operators of domain qcompile, this library knows %d: upgrade "
                "qcompile-onnx, or load the model without the library", kOperatorVersion));
  }
  block_size_ = attribute(info, "block_size", std::nullopt);
  if (block_size_ < 1 || block_size_ > kMaxSize) {
    refuse(text("block_size is %lld, it must be 1 to %lld: compile the model again", (long long)block_size_, (long long)kMaxSize));
  }
  const int64_t activation_bits = attribute(info, "activation_bits", 16);
  if (activation_bits != 8 && activation_bits != 16) {
    refuse(text("activation_bits is %lld, it must be 8 or 16: compile the model again", (long long)activation_bits));
  }
  activation_bits_ = int(activation_bits);

  size_t count;
  check(api.call<KernelInfo_GetInputCount>(info, &count));
  Shapes shapes;
  const OrtValue* constants[kInputs] = {};
  for (Input input : {kX, kW, kScale, kBias, kZeroPoint}) {
    if (!takes(input) || position(input) >= count) continue;
    int is_constant = 0;
    check(api.call<KernelInfoGetConstantInput_tensor>(info, position(input), &is_constant, &constants[input]));
    if (!is_constant) constants[input] = nullptr;
    if (constants[input]) shapes.of[input] = shape_of(api, constants[input]);
  }
  check_shapes(shapes);
  // TODO probing
  const bool has_zero_point = position(kZeroPoint) < count;
  if (!constants[kW] || !constants[kScale] || (has_zero_point && !constants[kZeroPoint])) return;
  const Source source = {static_cast<const uint8_t*>(data_of(api, constants[kW])), data_of(api, constants[kScale]), op.half,
                         has_zero_point ? static_cast<const uint8_t*>(data_of(api, constants[kZeroPoint])) : nullptr,
                         op.is_signed};
  const Layout layout = layout_of(shapes, source);
  weight_ = std::make_unique<PackedWeight>(layout, source, chosen_kernels());
  give_back_pages(source.codes, code_bytes(layout.k * layout.n));
  give_back_pages(source.scale, layout.file_groups() * layout.n * element_bytes());
}

std::string Kernel::node_name(const OrtKernelInfo* info) const {
  size_t size = 0;
  if (OrtStatus* status = api_.call<KernelInfo_GetNodeName>(info, (char*)nullptr, &size)) api_.call<ReleaseStatus>(status);
  std::string name(size, '\0');
  check(api_.call<KernelInfo_GetNodeName>(info, name.data(), &size));
  while (!name.empty() && name.back() == '\0') name.pop_back();
  return name;
}

int64_t Kernel::attribute(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const {
  int64_t value;
  OrtStatus* status = api_.call<KernelInfoGetAttribute_int64>(info, name, &value);
  if (!status) return value;
  api_.call<ReleaseStatus>(status);
  if (standard) return *standard;
  refuse(text("the integer attribute %s is missing: compile the model again", name));
}

void Kernel::check_shapes(const Shapes& shapes) const { (void)shapes; }

Layout Kernel::layout_of(const Shapes& shapes, const Source& source) const {
  const Shape& w = *shapes.of[kW];
  return make_layout(w[0], w[1], block_size_, op_.bits, source);
}

void Kernel::compute(OrtKernelContext* context) const {
  const OrtValue *x, *bias = nullptr;
  check(api_.call<KernelContext_GetInput>(context, kX, &x));
  if (op_.bias) check(api_.call<KernelContext_GetInput>(context, kBias, &bias));
  Shape shape = shape_of(api_, x);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.rank; ++i) m *= shape[i];
  const PackedWeight& weight = *weight_;
  shape.dims[shape.rank - 1] = weight.layout().n;
  OrtValue* y;
  check(api_.call<KernelContext_GetOutput>(context, size_t(0), shape.dims.data(), shape.rank, &y));
  if (m == 0) return;
  Pool pool{api_, context};
  weight.multiply(data_of(api_, x), op_.half ? Element::kHalf : Element::kFloat, m,
                  const_cast<void*>(data_of(api_, y)), bias ? data_of(api_, bias) : nullptr, activation_bits_,
                  {Pool::run, &pool});
}

// ---- What OrtCustomOp asks for

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

size_t input_count(const OrtCustomOp* op) { return self(op).bias ? 5 : 4; }

ONNXTensorElementDataType element_type(const OrtCustomOp* op) {
  return self(op).half ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  const Operator& mine = self(op);
  const bool codes = index == kW || index + 1 == input_count(op);
  if (!codes) return element_type(op);
  if (mine.bits == 4) return mine.is_signed ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4;
  return mine.is_signed ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

// ONNX Runtime calls that of the first operator of a name for all of its element types, so the type comes from input 0.
OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi& api = *self(op).api;
  return guarded(api, [&] {
    OrtTensorTypeAndShapeInfo *x_info, *w_info;  // the context owns them
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kX), &x_info));
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kW), &w_info));
    Shape shape = shape_of(api, x_info);
    const Shape w = shape_of(api, w_info);
    if (shape.rank == 0) return;  // a tensor of unknown rank looks like a scalar
    shape.dims[shape.rank - 1] = w.rank == 2 ? w[1] : -1;
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(x_info, &type));
    OrtTensorTypeAndShapeInfo* y_info;
    check(api.call<CreateTensorTypeAndShapeInfo>(&y_info));
    const InfoOwner owner = own(api, y_info);
    check(api.call<SetTensorElementType>(y_info, type));
    check(api.call<SetDimensions>(y_info, shape.dims.data(), shape.rank));
    check(api.call<ShapeInferContext_SetOutputTypeShape>(context, size_t(0), y_info));
  });
}

struct KernelWithApi {
  const OrtApi& api;
  Kernel kernel;
};

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return guarded(*api, [&] { *kernel = new KernelWithApi{*api, Kernel(self(op), *api, info)}; });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  auto& mine = *static_cast<KernelWithApi*>(kernel);
  return guarded(mine.api, [&] { mine.kernel.compute(context); });
}

Operator make(const OrtApi& api, const char* name, int bits, bool bias, bool half, bool is_signed, bool too_new) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return element_type(op); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<KernelWithApi*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return index + 1 == input_count(op) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = [](const OrtCustomOp* op) { return self(op).too_new ? kOperatorVersion + 1 : 1; };
  op.GetEndVersion = [](const OrtCustomOp* op) { return self(op).too_new ? INT_MAX : kOperatorVersion; };
  op.api = &api;
  op.name = name;
  op.bits = bits;
  op.bias = bias;
  op.half = half;
  op.is_signed = is_signed;
  op.too_new = too_new;
  return op;
}

}  // namespace

std::vector<Operator> operators(const ort::OrtApi& api) {
  std::vector<Operator> all;
  for (bool too_new : {false, true}) {
    for (bool half : {false, true}) {
      for (bool is_signed : {false, true}) {
        all.push_back(make(api, "MatMulInt4", 4, false, half, is_signed, too_new));
        all.push_back(make(api, "MatMulInt8", 8, false, half, is_signed, too_new));
        all.push_back(make(api, "MatMulAddInt4", 4, true, half, is_signed, too_new));
        all.push_back(make(api, "MatMulAddInt8", 8, true, half, is_signed, too_new));
      }
    }
  }
  return all;
}

}  // namespace qcompile
