// From ONNX Runtime's nodes to PackedWeight: checks every input, packs constant weights once, and multiplies.

#include "operators.h"

#include <array>
#include <atomic>
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

#include "c_api.h"
#include "matmul.h"

namespace qcompile {
namespace {

using namespace ort;

constexpr int64_t kMaxSize = int64_t(1) << 31;  // of K, N and block_size: products of two stay far from overflow
constexpr size_t kMaxRank = 32;

enum Input : size_t { kX, kW, kScale, kBias, kZeroPoint, kInputs };
constexpr Input kAllInputs[] = {kX, kW, kScale, kBias, kZeroPoint};
constexpr const char* kNames[kInputs] = {"x", "w", "scale", "bias", "zero_point"};

// ---- Failures: exceptions inside, an OrtStatus at the border. Nothing is thrown through C.

// A status of ONNX Runtime on its way back to it.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

// Whether it failed; the failure itself is dropped.
bool ignore(const OrtApi& api, OrtStatus* status) {
  if (status) api.call<ReleaseStatus>(status);
  return status != nullptr;
}

// Bad input, told in one line.
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
  if (shape.rank > kMaxRank) {
    throw Refusal("qcompile: a tensor has more than " + std::to_string(kMaxRank) + " dimensions");
  }
  check(api.call<GetDimensions>(info, shape.dims.data(), shape.rank));
  return shape;
}

Shape shape_of(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info;
  check(api.call<GetTensorTypeAndShape>(value, &info));
  const InfoOwner owner = own(api, info);
  return shape_of(api, info);
}

void* data_of(const OrtApi& api, const OrtValue* value) {
  void* data;
  check(api.call<GetTensorMutableData>(const_cast<OrtValue*>(value), &data));
  return data;
}

// ---- Memory

// Tells the kernel that the packed copy is what will be read from now on. File-backed pages come back if anyone asks.
void give_back_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  constexpr uintptr_t kWorthwhile = 1 << 16;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (begin < end && end - begin >= kWorthwhile) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
  (void)data, (void)bytes;
#endif
}

// ---- ONNX Runtime's intra-op pool

constexpr size_t kAsManyAsThreads = 0;

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
    check(pool.api.call<KernelContext_ParallelFor>(pool.context, +guarded_piece, total, kAsManyAsThreads, self));
    if (pool.out_of_memory) throw std::bad_alloc();
  }
};

// ---- One node

class Kernel {
 public:
  Kernel(const Operator& op, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

  const OrtApi& api() const { return api_; }

 private:
  // What is known of the inputs: while the model loads, all of the constant ones and some shapes of the others.
  struct Given {
    bool present[kInputs] = {};
    std::optional<Shape> shape[kInputs];
    const OrtValue* value[kInputs] = {};
  };

  bool takes(Input input) const { return input != kBias || op_.bias; }
  size_t position(Input input) const { return input == kZeroPoint && !op_.bias ? size_t(kBias) : size_t(input); }
  int64_t element_bytes() const { return op_.half ? 2 : 4; }

  template <typename... Values>
  [[noreturn]] void refuse(const char* format, Values... values) const;
  std::string node_name(const OrtKernelInfo* info) const;
  int64_t attribute(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const;
  void check_attributes(const OrtKernelInfo* info);
  Given given_at_load(const OrtKernelInfo* info) const;
  Given given_at_run(const OrtKernelContext* context) const;
  void check_shapes(const Given& given) const;
  int64_t check_rows(const Shape& x, int64_t k) const;
  std::unique_ptr<const PackedWeight> pack_weight(const Given& given) const;
  void give_back(const Given& given) const;
  void multiply(const PackedWeight& weight, const OrtValue* x, const OrtValue* bias, OrtKernelContext* context) const;

  const Operator& op_;
  const OrtApi& api_;
  const Kernels* kernels_;
  std::string node_;
  int64_t block_size_;
  int activation_bits_;
  bool checked_bias_ = false;                   // its shape was known at load
  std::unique_ptr<const PackedWeight> weight_;  // empty where w, scale or zero_point is no constant
};

Kernel::Kernel(const Operator& op, const OrtKernelInfo* info)
    : op_(op), api_(*op.api), kernels_(chosen_kernels()), node_(node_name(info)) {
  if (!kernels_) refuse("QCOMPILE_KERNEL was changed since the library was registered: it may be %s", kernel_names());
  check_attributes(info);
  const Given given = given_at_load(info);
  check_shapes(given);
  checked_bias_ = given.value[kBias] != nullptr;
  for (Input input : {kW, kScale, kZeroPoint}) {
    if (given.present[input] && !given.value[input]) return;
  }
  weight_ = pack_weight(given);
  give_back(given);
}

// The line that reaches the user: which node, what is wrong, what to do.
template <typename... Values>
void Kernel::refuse(const char* format, Values... values) const {
  char what[512];
  std::snprintf(what, sizeof what, format, values...);
  throw Refusal("node '" + node_ + "' (" + op_.name + "): " + what);
}

std::string Kernel::node_name(const OrtKernelInfo* info) const {
  size_t size = 0;  // with the closing zero
  ignore(api_, api_.call<KernelInfo_GetNodeName>(info, static_cast<char*>(nullptr), &size));
  std::string name(size, '\0');
  check(api_.call<KernelInfo_GetNodeName>(info, name.data(), &size));
  name.resize(size ? size - 1 : 0);
  return name;
}

// An integer attribute; of another type, it is refused and not taken for absent.
int64_t Kernel::attribute(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const {
  int64_t value;
  if (!ignore(api_, api_.call<KernelInfoGetAttribute_int64>(info, name, &value))) return value;
  float number;
  size_t size = 0;
  if (!ignore(api_, api_.call<KernelInfoGetAttribute_float>(info, name, &number)) ||
      !ignore(api_, api_.call<KernelInfoGetAttribute_string>(info, name, static_cast<char*>(nullptr), &size))) {
    refuse("attribute %s must be an integer: compile the model again", name);
  }
  if (!standard) refuse("the integer attribute %s is missing: compile the model again", name);
  return *standard;
}

void Kernel::check_attributes(const OrtKernelInfo* info) {
  // Written by compilers of later versions: ONNX Runtime shows no operator the opset imports of its model.
  const int64_t version = attribute(info, "version", 1);
  if (version > kOperatorVersion) {
    refuse("the model needs operators version %lld of domain qcompile, this library knows %d: upgrade qcompile-onnx, "
           "or load the model without the library", (long long)version, kOperatorVersion);
  }
  block_size_ = attribute(info, "block_size", std::nullopt);
  if (block_size_ < 1 || block_size_ > kMaxSize) {
    refuse("block_size is %lld, it must be 1 to %lld: compile the model again", (long long)block_size_,
           (long long)kMaxSize);
  }
  const int64_t bits = attribute(info, "activation_bits", 16);
  if (bits != 8 && bits != 16) {
    refuse("activation_bits is %lld, it must be 8 or 16: compile the model again", (long long)bits);
  }
  activation_bits_ = int(bits);
}

Kernel::Given Kernel::given_at_load(const OrtKernelInfo* info) const {
  size_t count;
  check(api_.call<KernelInfo_GetInputCount>(info, &count));
  Given given;
  for (Input input : kAllInputs) {
    OrtTypeInfo* type;
    if (!takes(input) || position(input) >= count) continue;
    if (ignore(api_, api_.call<KernelInfo_GetInputTypeInfo>(info, position(input), &type))) continue;  // left open
    given.present[input] = true;
    const std::unique_ptr<OrtTypeInfo, ReleaseTypeInfo::Function> owner(type, api_.function<ReleaseTypeInfo>());
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_.call<KernelInfoGetConstantInput_tensor>(info, position(input), &is_constant, &value));
    if (is_constant) {
      given.value[input] = value;
      given.shape[input] = shape_of(api_, value);
      continue;
    }
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api_.call<CastTypeInfoToTensorInfo>(type, &tensor));
    if (!tensor) continue;
    const Shape shape = shape_of(api_, tensor);
    if (shape.rank > 0) given.shape[input] = shape;  // a tensor of unknown rank looks like a scalar
  }
  return given;
}

Kernel::Given Kernel::given_at_run(const OrtKernelContext* context) const {
  size_t count;
  check(api_.call<KernelContext_GetInputCount>(context, &count));
  Given given;
  for (Input input : kAllInputs) {
    if (!takes(input) || position(input) >= count) continue;
    check(api_.call<KernelContext_GetInput>(context, position(input), &given.value[input]));
    if (!given.value[input]) continue;
    given.present[input] = true;
    given.shape[input] = shape_of(api_, given.value[input]);
  }
  return given;
}

// Refuses whatever cannot be right, whichever shapes are known.
void Kernel::check_shapes(const Given& given) const {
  constexpr size_t kRanks[kInputs] = {0, 2, 2, 1, 2};
  for (Input input : {kW, kScale, kBias, kZeroPoint}) {
    const auto& shape = given.shape[input];
    if (shape && shape->rank != kRanks[input]) {
      refuse("%s has shape %s, it must have %zu dimensions: compile the model again", kNames[input],
             shape->text().c_str(), kRanks[input]);
    }
  }
  const Shape unknown = {{-1, -1}, 2};
  const Shape w = given.shape[kW].value_or(unknown);
  for (int64_t size : {w[0], w[1]}) {
    if (size == 0 || size > kMaxSize) {
      refuse("w has shape %s, K and N must be 1 to %lld: compile the model again", w.text().c_str(),
             (long long)kMaxSize);
    }
  }
  if (given.shape[kX]) check_rows(*given.shape[kX], w[0]);
  const Shape grid = {{w[0] < 0 ? -1 : div_up(w[0], block_size_), w[1]}, 2};
  for (Input input : {kScale, kZeroPoint}) {
    const auto& shape = given.shape[input];
    if (shape && (differ((*shape)[0], grid[0]) || differ((*shape)[1], grid[1]))) {
      refuse("%s has shape %s, w %s with block_size %lld needs %s: compile the model again", kNames[input],
             shape->text().c_str(), w.text().c_str(), (long long)block_size_, grid.text().c_str());
    }
  }
  const auto& bias = given.shape[kBias];
  if (bias && differ((*bias)[0], w[1])) {
    refuse("bias has shape %s, w %s needs (%lld,): compile the model again", bias->text().c_str(), w.text().c_str(),
           (long long)w[1]);
  }
}

// The number of rows of x (…, K), −1 where that is not known.
int64_t Kernel::check_rows(const Shape& x, int64_t k) const {
  if (x.rank == 0) refuse("x is a scalar, it must have at least one dimension");
  if (differ(x[x.rank - 1], k)) {
    refuse("x has shape %s, its last dimension must be the %lld rows of w", x.text().c_str(), (long long)k);
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) {
    if (x[i] < 0) return -1;
    if (__builtin_mul_overflow(rows, x[i], &rows)) refuse("x has shape %s, which is too large", x.text().c_str());
  }
  return rows;
}

std::unique_ptr<const PackedWeight> Kernel::pack_weight(const Given& given) const {
  const Shape& w = *given.shape[kW];
  const OrtValue* zero_point = given.value[kZeroPoint];
  Source source{};
  source.codes = static_cast<const uint8_t*>(data_of(api_, given.value[kW]));
  source.scale = data_of(api_, given.value[kScale]);
  source.scale_is_half = op_.half;
  if (zero_point) source.zero_point = static_cast<const uint8_t*>(data_of(api_, zero_point));
  source.is_signed = op_.is_signed;
  const Layout layout = make_layout(w[0], w[1], block_size_, op_.bits, source);
  return std::make_unique<const PackedWeight>(layout, source, kernels_);
}

void Kernel::give_back(const Given& given) const {
  const auto elements = [&](Input input) { return (*given.shape[input])[0] * (*given.shape[input])[1]; };
  give_back_pages(data_of(api_, given.value[kW]), elements(kW) * op_.bits / 8);
  give_back_pages(data_of(api_, given.value[kScale]), elements(kScale) * element_bytes());
  if (given.present[kZeroPoint]) {
    give_back_pages(data_of(api_, given.value[kZeroPoint]), elements(kZeroPoint) * op_.bits / 8);
  }
}

void Kernel::compute(OrtKernelContext* context) const {
  if (!weight_) {
    const Given given = given_at_run(context);
    check_shapes(given);
    multiply(*pack_weight(given), given.value[kX], given.value[kBias], context);
    return;
  }
  const OrtValue *x, *bias = nullptr;
  check(api_.call<KernelContext_GetInput>(context, size_t(kX), &x));
  if (op_.bias) {
    check(api_.call<KernelContext_GetInput>(context, size_t(kBias), &bias));
    if (!checked_bias_) {
      Given given;
      given.shape[kW] = Shape{{weight_->layout().k, weight_->layout().n}, 2};
      given.shape[kBias] = shape_of(api_, bias);
      check_shapes(given);
    }
  }
  multiply(*weight_, x, bias, context);
}

void Kernel::multiply(const PackedWeight& weight, const OrtValue* x, const OrtValue* bias,
                      OrtKernelContext* context) const {
  Shape shape = shape_of(api_, x);
  const int64_t m = check_rows(shape, weight.layout().k);
  shape.dims[shape.rank - 1] = weight.layout().n;
  OrtValue* y;
  check(api_.call<KernelContext_GetOutput>(context, size_t(0), shape.dims.data(), shape.rank, &y));
  if (m == 0) return;
  Pool pool{api_, context};
  weight.multiply(data_of(api_, x), op_.half ? Element::kHalf : Element::kFloat, m, data_of(api_, y),
                  bias ? data_of(api_, bias) : nullptr, activation_bits_, {Pool::run, &pool});
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

// (…, K) and (K, N) -> (…, N), with the names of unknown dimensions. ONNX Runtime calls the function of the first
// operator of a name for all of its element types, so the type comes from input 0. It finds the type by itself where
// this gives up.
OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi& api = *self(op).api;
  return guarded(api, [&] {
    OrtTensorTypeAndShapeInfo *x_info, *w_info;  // the context owns them
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kX), &x_info));
    check(api.call<ShapeInferContext_GetInputTypeShape>(context, size_t(kW), &w_info));
    Shape y = shape_of(api, x_info);
    const Shape w = shape_of(api, w_info);
    if (y.rank == 0 || w.rank != 2 || w[1] < 0) return;
    std::array<const char*, kMaxRank> names{};
    check(api.call<GetSymbolicDimensions>(x_info, names.data(), y.rank));
    y.dims[y.rank - 1] = w[1];
    names[y.rank - 1] = "";
    std::vector<std::string> made(y.rank);
    for (size_t i = 0; i < y.rank; ++i) {
      if (y[i] >= 0 || *names[i]) continue;  // without a name, −1 would be taken for a size, equal to any other −1
      static std::atomic<unsigned> count{0};
      made[i] = "qcompile_" + std::to_string(count++);
      names[i] = made[i].c_str();
    }
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(x_info, &type));
    OrtTensorTypeAndShapeInfo* y_info;
    check(api.call<CreateTensorTypeAndShapeInfo>(&y_info));
    const InfoOwner owner = own(api, y_info);
    check(api.call<SetTensorElementType>(y_info, type));
    check(api.call<SetDimensions>(y_info, y.dims.data(), y.rank));
    check(api.call<SetSymbolicDimensions>(y_info, names.data(), y.rank));
    check(api.call<ShapeInferContext_SetOutputTypeShape>(context, size_t(0), y_info));
  });
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return guarded(*api, [&] { *kernel = new Kernel(self(op), info); });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto& mine = *static_cast<const Kernel*>(kernel);
  return guarded(mine.api(), [&] { mine.compute(context); });
}

Operator make(const OrtApi& api, const char* name, int bits, bool bias, bool half, bool is_signed) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return element_type(op); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
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
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return kOperatorVersion; };
  op.api = &api;
  op.name = name;
  op.bits = bits;
  op.bias = bias;
  op.half = half;
  op.is_signed = is_signed;
  return op;
}

}  // namespace

std::vector<Operator> operators(const ort::OrtApi& api) {
  std::vector<Operator> all;
  for (bool half : {false, true}) {
    for (bool is_signed : {false, true}) {
      all.push_back(make(api, "MatMulInt4", 4, false, half, is_signed));
      all.push_back(make(api, "MatMulInt8", 8, false, half, is_signed));
      all.push_back(make(api, "MatMulAddInt4", 4, true, half, is_signed));
      all.push_back(make(api, "MatMulAddInt8", 8, true, half, is_signed));
    }
  }
  return all;
}

}  // namespace qcompile
