#include "node.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "c_api.h"

namespace qcompile {

using namespace ort;

namespace {

constexpr int64_t kMaxSize = int64_t(1) << 31;  // of K, N and block_size: products of two stay far from overflow
constexpr int kLeastExponent = -126, kMostExponent = 127;  // 2^exponent is a float, and no subnormal one
constexpr Input kAllInputs[] = {kX, kW, kScale, kBias, kZeroPoint};

// Whether it failed; the failure itself is dropped.
bool ignore(const OrtApi& api, OrtStatus* status) {
  if (status) api.call<ReleaseStatus>(status);
  return status != nullptr;
}

// Whether two dimensions cannot be the same.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

// File-backed pages come back if anyone asks.
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

}  // namespace

const char* name_of(Input input) {
  constexpr const char* kNames[kInputs] = {"x", "w", "scale", "bias", "zero_point"};
  return kNames[input];
}

// ---- Shapes

std::string Shape::text() const {
  std::string out = "(";
  for (size_t i = 0; i < rank; ++i) {
    out += (i ? ", " : "") + (dims[i] < 0 ? std::string("?") : std::to_string(dims[i]));
  }
  return out + (rank == 1 ? ",)" : ")");
}

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

// ---- Name and attributes

void check_version(const std::string& label, int64_t version) {
  if (version <= kOperatorVersion) return;
  throw Refusal(label + "the model needs operators version " + std::to_string(version) +
                " of domain qcompile, this library knows " + std::to_string(kOperatorVersion) +
                ": upgrade qcompile-onnx, or load the model without the library");
}

Node::Node(const Operator& op, const OrtKernelInfo* info) : op_(op), api_(*op.api), name_(node_name(info)) {
  check_attributes(info);
}

std::string Node::node_name(const OrtKernelInfo* info) const {
  size_t size = 0;  // with the closing zero
  ignore(api_, api_.call<KernelInfo_GetNodeName>(info, static_cast<char*>(nullptr), &size));
  std::string name(size, '\0');
  check(api_.call<KernelInfo_GetNodeName>(info, name.data(), &size));
  name.resize(size ? size - 1 : 0);
  return name;
}

// An integer attribute; of another type, it is refused and not taken for absent.
int64_t Node::attribute(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const {
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

// A list of integers, empty where there is none.
std::vector<int64_t> Node::attributes(const OrtKernelInfo* info, const char* name) const {
  size_t size = 0;
  int64_t* none = nullptr;
  if (ignore(api_, api_.call<KernelInfoGetAttributeArray_int64>(info, name, none, &size))) {
    if (attribute(info, name, -1) != -1) refuse("attribute %s must be a list of integers: compile the model again", name);
    return {};
  }
  std::vector<int64_t> values(size);
  if (size) check(api_.call<KernelInfoGetAttributeArray_int64>(info, name, values.data(), &size));
  return values;
}

void Node::check_attributes(const OrtKernelInfo* info) {
  // Written by compilers of later versions: ONNX Runtime shows no operator the opset imports of its model.
  const int64_t version = attribute(info, "version", 1);
  check_version(label(), version);
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
  columns_at_8_ = attributes(info, "columns_at_8");
  if (op_.of().in_fields()) {
    rows_ = attribute(info, "K", std::nullopt);
    if (rows_ < 1 || rows_ > kMaxSize) {
      refuse("K is %lld, it must be 1 to %lld: compile the model again", (long long)rows_, (long long)kMaxSize);
    }
    if (block_size_ < rows_ && block_size_ % op_.of().shared()) {
      refuse("block_size is %lld, it must be even or all of K: compile the model again", (long long)block_size_);
    }
  }
  if (!op_.of().byte_scales()) return;  // the type of x is that of the scales
  const int64_t dtype = attribute(info, "dtype", std::nullopt);
  if (dtype != op_.element) {
    refuse("dtype is %lld, but x is of type %d: compile the model again", (long long)dtype, int(op_.element));
  }
  if (op_.of().scales != Stored::kE4M3) return;
  const int64_t exponent = attribute(info, "exponent", std::nullopt);
  if (exponent < kLeastExponent || exponent > kMostExponent) {
    refuse("exponent is %lld, it must be %d to %d: compile the model again", (long long)exponent, kLeastExponent, kMostExponent);
  }
  exponent_ = int(exponent);
}

// ---- Inputs

Node::Given Node::given_at_load(const OrtKernelInfo* info) const {
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

Node::Given Node::given_at_run(const OrtKernelContext* context) const {
  size_t count;
  check(api_.call<KernelContext_GetInputCount>(context, &count));
  Given given;
  for (Input input : kAllInputs) {
    if (!takes(input) || position(input) >= count) continue;
    given.value[input] = this->input(context, input);
    if (!given.value[input]) continue;
    given.present[input] = true;
    given.shape[input] = shape_of(api_, given.value[input]);
  }
  return given;
}

const OrtValue* Node::input(const OrtKernelContext* context, Input input) const {
  const OrtValue* value;
  check(api_.call<KernelContext_GetInput>(context, position(input), &value));
  return value;
}

void Node::check_shapes(const Given& given) const {
  constexpr size_t kRanks[kInputs] = {0, 2, 2, 1, 2};
  for (Input input : {kW, kScale, kBias, kZeroPoint}) {
    const auto& shape = given.shape[input];
    if (shape && shape->rank != kRanks[input]) {
      refuse("%s has shape %s, it must have %zu dimensions: compile the model again", name_of(input),
             shape->text().c_str(), kRanks[input]);
    }
  }
  const Shape unknown = {{-1, -1}, 2};
  const Shape stored = given.shape[kW].value_or(unknown), w = weight_shape(stored);
  for (int64_t size : {w[0], w[1]}) {
    if (size == 0 || size > kMaxSize) {
      refuse("w has shape %s, K and N must be 1 to %lld: compile the model again", w.text().c_str(),
             (long long)kMaxSize);
    }
  }
  if (given.shape[kX]) check_rows(*given.shape[kX], w[0]);
  if (w[1] >= 0) check_columns(w[1]);
  const bool fields = op_.of().in_fields();
  if (fields && differ(stored[0], op_.of().byte_rows(w[0]))) {
    refuse("w has shape %s, %lld rows of codes take %lld rows of bytes: compile the model again", stored.text().c_str(),
           (long long)w[0], (long long)op_.of().byte_rows(w[0]));
  }
  const int64_t groups = w[0] < 0 ? -1 : div_up(w[0], block_size_);
  for (Input input : {kScale, kZeroPoint}) {
    const auto& shape = given.shape[input];
    const Shape grid = {{input == kZeroPoint && fields ? op_.of().byte_rows(groups) : groups, w[1]}, 2};
    if (shape && (differ((*shape)[0], grid[0]) || differ((*shape)[1], grid[1]))) {
      refuse("%s has shape %s, w %s with block_size %lld needs %s: compile the model again", name_of(input),
             shape->text().c_str(), w.text().c_str(), (long long)block_size_, grid.text().c_str());
    }
  }
  const auto& bias = given.shape[kBias];
  if (bias && differ((*bias)[0], w[1])) {
    refuse("bias has shape %s, w %s needs (%lld,): compile the model again", bias->text().c_str(), w.text().c_str(),
           (long long)w[1]);
  }
}

void Node::check_bias(const OrtValue* bias, int64_t k, int64_t n) const {
  Given given;
  given.shape[kW] = Shape{{k, n}, 2};
  given.shape[kBias] = shape_of(api_, bias);
  check_shapes(given);
}

void Node::check_columns(int64_t n) const {
  bool sound = columns_at_8_.size() % 2 == 0;
  for (size_t i = 0; i + 1 < columns_at_8_.size(); i += 2) {
    sound &= 0 <= columns_at_8_[i] && columns_at_8_[i] <= columns_at_8_[i + 1] && columns_at_8_[i + 1] <= n;
  }
  if (sound) return;
  refuse("columns_at_8 must be begins and ends of ranges within the %lld columns of w: compile the model again",
         (long long)n);
}

// The number of rows of x (…, K), −1 where that is not known.
int64_t Node::check_rows(const Shape& x, int64_t k) const {
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

// ---- The weight and the output

Shape Node::weight_shape(const Shape& w) const { return !op_.of().in_fields() ? w : Shape{{rows_, w[1]}, 2}; }

Source Node::source(const Given& given) const {
  Source source{};
  source.codes = static_cast<const uint8_t*>(data_of(api_, given.value[kW]));
  source.scale = data_of(api_, given.value[kScale]);
  source.scale_is_half = element_bytes() == 2;
  if (given.value[kZeroPoint]) source.zero_point = static_cast<const uint8_t*>(data_of(api_, given.value[kZeroPoint]));
  source.is_signed = op_.is_signed;
  source.exponent = exponent_;
  return source;
}

void Node::give_back(const Given& given) const {
  for (Input input : kWeightInputs) {
    if (!given.value[input]) continue;
    const Shape& shape = *given.shape[input];
    const int64_t codes = !op_.of().in_fields() ? op_.of().bits : 8;  // of an element of w
    const int64_t bits = input != kScale ? codes : op_.of().byte_scales() ? 8 : 8 * element_bytes();
    give_back_pages(data_of(api_, given.value[input]), shape[0] * shape[1] * bits / 8);
  }
}

Node::Output Node::output(OrtKernelContext* context, const OrtValue* x, int64_t k, int64_t n) const {
  Shape shape = shape_of(api_, x);
  const int64_t rows = check_rows(shape, k);
  shape.dims[shape.rank - 1] = n;
  OrtValue* y;
  check(api_.call<KernelContext_GetOutput>(context, size_t(0), shape.dims.data(), shape.rank, &y));
  return {y, rows};
}

}  // namespace qcompile
