// GroupQueryAttention: com.microsoft's operator of that name over caches of more kinds, and faster (attention.h).

#include <cmath>
#include <optional>
#include <vector>

#include "attention.h"
#include "light.h"

namespace qcompile {
namespace {

// Inputs, as com.microsoft's have them. A rotation has both tables; position_ids say which of their rows to take.
enum Slot : size_t {
  kQuery, kKey, kValue, kPastKey, kPastValue, kSeqlens, kTotal, kCos, kSin, kPositions, kBias_, kSink, kKeyScale, kValueScale,
  kSlots
};

constexpr const char* kNames[kSlots] = {
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale"};

CacheType cache_type(ONNXTensorElementDataType type) {
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return CacheType::kFloat;
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? CacheType::kHalf : CacheType::kInt8;
}

class AttentionNode {
 public:
  AttentionNode(const LightOperator& op, const OrtKernelInfo* info);
  const OrtApi& api() const { return *op_.api; }
  void compute(OrtKernelContext* context) const;

 private:
  // What a run was given.
  struct Tensor {
    const OrtValue* value = nullptr;
    Shape shape;
    explicit operator bool() const { return value != nullptr; }
  };
  struct Inputs {
    Tensor of[kSlots];
    const Tensor& operator[](Slot slot) const { return of[slot]; }
  };

  int64_t integer(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const;
  float number(const OrtKernelInfo* info, const char* name) const;
  Inputs inputs(const OrtKernelContext* context) const;
  const void* data(const Tensor& tensor) const { return data_of(api(), tensor.value); }
  void take_queries(const Inputs& given, Attention& run) const;
  void take_caches(const Inputs& given, Attention& run, int64_t total) const;
  void take_rotation(const Inputs& given, Attention& run) const;
  void take_bias(const Inputs& given, Attention& run, int64_t total) const;
  void take_scales(const Inputs& given, Attention& run) const;

  const LightOperator& op_;
  const Kernels* kernels_;
  int64_t heads_, groups_, window_;
  bool rotary_, interleaved_;
  float scale_, softcap_;
};

AttentionNode::AttentionNode(const LightOperator& op, const OrtKernelInfo* info) : op_(op), kernels_(chosen_kernels()) {
  check_attributes(op, info);
  if (!kernels_) refuse(op, "QCOMPILE_KERNEL was changed since the library was registered: it may be %s", kernel_names());
  heads_ = integer(info, "num_heads", std::nullopt);
  groups_ = integer(info, "kv_num_heads", std::nullopt);
  if (heads_ < 1 || groups_ < 1 || heads_ % groups_) {
    refuse(op, "%lld heads and %lld of keys and values: compile the model again", (long long)heads_, (long long)groups_);
  }
  window_ = integer(info, "local_window_size", -1);
  rotary_ = integer(info, "do_rotary", 0) == 1;
  interleaved_ = integer(info, "rotary_interleaved", 0) == 1;
  scale_ = number(info, "scale");
  softcap_ = number(info, "softcap");
}

int64_t AttentionNode::integer(const OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const {
  int64_t value = standard.value_or(0);
  OrtStatus* absent = api().call<KernelInfoGetAttribute_int64>(info, name, &value);
  if (!absent) return value;
  if (!standard) throw Failure{absent};
  api().call<ReleaseStatus>(absent);
  return *standard;
}

float AttentionNode::number(const OrtKernelInfo* info, const char* name) const {
  float value = 0;
  if (OrtStatus* absent = api().call<KernelInfoGetAttribute_float>(info, name, &value)) {
    api().call<ReleaseStatus>(absent);
    return 0;
  }
  return value;
}

AttentionNode::Inputs AttentionNode::inputs(const OrtKernelContext* context) const {
  size_t count;
  check(api().call<KernelContext_GetInputCount>(context, &count));
  Inputs given;
  for (size_t slot = 0; slot < kSlots && slot < count; ++slot) {
    Tensor& tensor = given.of[slot];
    tensor.value = input(op_, context, slot);
    if (tensor) tensor.shape = shape_of(api(), tensor.value);
  }
  for (Slot slot : {kQuery, kPastKey, kPastValue, kSeqlens, kTotal}) {
    if (!given[slot]) refuse(op_, "input %s is missing: compile the model again", kNames[slot]);
  }
  if (given[kSink]) refuse(op_, "it takes no head_sink: compile the model again");
  return given;
}

// query (batch, rows, heads width), key and value (batch, rows, groups width); or all of them in query, side by side.
void AttentionNode::take_queries(const Inputs& given, Attention& run) const {
  const Shape& query = given[kQuery].shape;
  const bool packed = !given[kKey], half = op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  const int64_t wide = packed ? heads_ + 2 * groups_ : heads_;
  if (query.rank != 3 || query[2] % wide || packed == bool(given[kValue])) {
    refuse(op_, "query has shape %s, for %lld heads", query.text().c_str(), (long long)wide);
  }
  run.batch = query[0];
  run.rows = query[1];
  run.heads = heads_;
  run.groups = groups_;
  run.width = query[2] / wide;
  if (run.width < 1 || run.width > kMaxWidth) refuse(op_, "heads of %lld numbers, it takes 1 to %lld", (long long)run.width, (long long)kMaxWidth);
  const auto at = [&](const void* data, int64_t head) {
    return static_cast<const void*>(static_cast<const uint8_t*>(data) + head * run.width * (half ? 2 : 4));
  };
  const void* whole = data(given[kQuery]);
  run.query = {whole, wide * run.width, half};
  if (packed) {
    run.key = {at(whole, heads_), wide * run.width, half};
    run.value = {at(whole, heads_ + groups_), wide * run.width, half};
    return;
  }
  for (Slot slot : {kKey, kValue}) {
    const Shape& shape = given[slot].shape;
    if (shape.rank != 3 || shape[0] != run.batch || shape[1] != run.rows || shape[2] != groups_ * run.width) {
      refuse(op_, "%s has shape %s beside query %s", kNames[slot], shape.text().c_str(), query.text().c_str());
    }
    (slot == kKey ? run.key : run.value) = {data(given[slot]), groups_ * run.width, half};
  }
}

void AttentionNode::take_caches(const Inputs& given, Attention& run, int64_t total) const {
  run.type = cache_type(op_.cache);
  run.past = given[kPastKey].shape[2];
  for (Slot slot : {kPastKey, kPastValue}) {
    const Shape& shape = given[slot].shape;
    if (shape.rank != 4 || shape[0] != run.batch || shape[1] != groups_ || shape[2] != run.past || shape[3] != run.width) {
      refuse(op_, "%s has shape %s for %lld sequences and %lld heads of %lld", kNames[slot], shape.text().c_str(),
             (long long)run.batch, (long long)groups_, (long long)run.width);
    }
  }
  run.past_key = static_cast<const uint8_t*>(data(given[kPastKey]));
  run.past_value = static_cast<const uint8_t*>(data(given[kPastValue]));
  if (total < 1) refuse(op_, "total_sequence_length is %lld, it must be positive", (long long)total);
  run.room = std::max(run.past, total);
  if (product(given[kSeqlens].shape, given[kSeqlens].shape.rank) != run.batch) {
    refuse(op_, "seqlens_k has shape %s for %lld sequences", given[kSeqlens].shape.text().c_str(), (long long)run.batch);
  }
  run.last = static_cast<const int32_t*>(data(given[kSeqlens]));
  run.prompt = total == run.rows;
  // No sequence is longer than total: what has numbers for total positions, as the bias, has them for all that are read.
  for (int64_t i = 0; i < run.batch; ++i) {
    const int64_t before = run.before(i), last = run.last[i];
    if (before < 0 || before > run.past || before + run.rows > total || last < 0 || last >= total) {
      refuse(op_, "sequence %lld ends at position %lld, with %lld rows, caches of %lld and total_sequence_length %lld",
             (long long)i, (long long)last, (long long)run.rows, (long long)run.past, (long long)total);
    }
  }
}

void AttentionNode::take_rotation(const Inputs& given, Attention& run) const {
  if (!rotary_) return;
  const Tensor &cos = given[kCos], &sin = given[kSin], &positions = given[kPositions];
  if (!cos || !sin || cos.shape.rank != 2 || sin.shape.rank != 2 || cos.shape[1] != sin.shape[1] ||
      cos.shape[0] != sin.shape[0] || 2 * cos.shape[1] > run.width) {
    refuse(op_, "cos_cache %s and sin_cache %s do not turn heads of %lld", cos ? cos.shape.text().c_str() : "missing",
           sin ? sin.shape.text().c_str() : "missing", (long long)run.width);
  }
  run.cos = data(cos);
  run.sin = data(sin);
  run.table_rows = cos.shape[0];
  run.pairs = cos.shape[1];
  run.interleaved = interleaved_;
  run.tables_half = op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  const auto within = [&](int64_t place) {
    if (place >= 0 && place < run.table_rows) return;
    refuse(op_, "position %lld is beyond the %lld rows of cos_cache", (long long)place, (long long)run.table_rows);
  };
  if (positions) {
    if (product(positions.shape, positions.shape.rank) != run.batch * run.rows) {
      refuse(op_, "position_ids has shape %s for %lld sequences of %lld rows", positions.shape.text().c_str(),
             (long long)run.batch, (long long)run.rows);
    }
    run.position = static_cast<const int64_t*>(data(positions));
    for (int64_t i = 0; i < run.batch * run.rows; ++i) within(run.position[i]);
  } else {
    for (int64_t i = 0; i < run.batch; ++i) within(run.before(i) + run.rows - 1);
  }
}

void AttentionNode::take_bias(const Inputs& given, Attention& run, int64_t total) const {
  if (!given[kBias_]) return;
  const Shape& shape = given[kBias_].shape;
  const auto fits = [&](int64_t axis, int64_t size) { return shape[size_t(axis)] == 1 || shape[size_t(axis)] == size; };
  if (shape.rank != 4 || !fits(0, run.batch) || !fits(1, heads_) || shape[2] != run.rows || shape[3] < total) {
    refuse(op_, "attention_bias has shape %s for %lld sequences, %lld heads, %lld rows and %lld positions",
           shape.text().c_str(), (long long)run.batch, (long long)heads_, (long long)run.rows, (long long)total);
  }
  run.bias = data(given[kBias_]);
  run.bias_batch = shape[0];
  run.bias_heads = shape[1];
  run.bias_positions = shape[3];
  run.bias_half = op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

void AttentionNode::take_scales(const Inputs& given, Attention& run) const {
  for (Slot slot : {kKeyScale, kValueScale}) {
    const Tensor& scale = given[slot];
    if (bool(scale) != (run.type == CacheType::kInt8)) {
      refuse(op_, "%s goes with caches of int8 codes alone: compile the model again", kNames[slot]);
    }
    if (!scale) continue;
    const int64_t count = product(scale.shape, scale.shape.rank);
    if (count != 1 && count != groups_ * run.width) {
      refuse(op_, "%s has shape %s for %lld heads of %lld: compile the model again", kNames[slot],
             scale.shape.text().c_str(), (long long)groups_, (long long)run.width);
    }
    (slot == kKeyScale ? run.key_scale : run.value_scale) = static_cast<const float*>(data(scale));
    (slot == kKeyScale ? run.key_channels : run.value_channels) = count > 1;
  }
}

void AttentionNode::compute(OrtKernelContext* context) const {
  const Inputs given = inputs(context);
  Attention run{};
  take_queries(given, run);
  if (product(given[kTotal].shape, given[kTotal].shape.rank) != 1) refuse(op_, "total_sequence_length must be one number");
  const int64_t total = *static_cast<const int32_t*>(data(given[kTotal]));
  take_caches(given, run, total);
  take_rotation(given, run);
  take_bias(given, run, total);
  take_scales(given, run);
  run.scale = scale_ == 0 ? 1.0f / std::sqrt(float(run.width)) : scale_;
  run.softcap = softcap_;
  run.window = std::max<int64_t>(window_, 0);
  run.out = output(op_, context, Shape{{run.batch, run.rows, heads_ * run.width}, 3});
  const Shape present = {{run.batch, groups_, run.room, run.width}, 4};
  run.present_key = static_cast<uint8_t*>(output(op_, context, present, 1));
  run.present_value = static_cast<uint8_t*>(output(op_, context, present, 2));
  if (run.batch == 0 || run.rows == 0) return;
  Pool pool{api(), context};
  attend(run, *kernels_, {Pool::run, &pool});
}

// ---- The operator

ONNXTensorElementDataType input_type(const OrtCustomOp* self, size_t index) {
  const LightOperator& op = *static_cast<const LightOperator*>(self);
  switch (index) {
    case kPastKey: case kPastValue: return op.cache;
    case kSeqlens: case kTotal: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case kPositions: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case kKeyScale: case kValueScale: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    default: return op.element;
  }
}

// The caches come longer by what only a run tells; the result is as wide as queries are, where these come alone.
OrtStatus* infer_shapes(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi& api = *static_cast<const LightOperator*>(self)->api;
  return guarded(api, [&] {
    for (size_t index : {0, 1, 2}) {
      const OrtTensorTypeAndShapeInfo* like = input_info(api, context, index == 0 ? size_t(kQuery) : kPastKey + index - 1);
      Shape y = shape_of(api, like);
      if (y.rank != (index == 0 ? 3 : 4)) continue;
      ONNXTensorElementDataType type;
      check(api.call<GetTensorElementType>(like, &type));
      y.dims[2] = -1;
      infer_output(api, context, like, 2, y, type, index);
    }
  });
}

LightOperator make_attention(const OrtApi& api, const char* name, ONNXTensorElementDataType element,
                             ONNXTensorElementDataType cache) {
  LightOperator op = make(api, name, element);
  op.cache = cache;
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(kSlots); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    const bool always = index == kQuery || (index >= kPastKey && index <= kTotal);
    return always ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputType = [](const OrtCustomOp* op, size_t index) {
    const LightOperator& own = *static_cast<const LightOperator*>(op);
    return index == 0 ? own.element : own.cache;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(3); };
  op.InferOutputShapeFn = infer_shapes;
  run_with<AttentionNode>(op);
  return op;
}

}  // namespace

std::vector<LightOperator> attention_operators(const OrtApi& api) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  std::vector<LightOperator> all;
  for (auto element : {kFloat, kHalf}) {
    for (auto cache : {element, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8}) {
      all.push_back(make_attention(api, "GroupQueryAttention", element, cache));
    }
  }
  all.push_back(make_attention(api, "GroupQueryAttentionF16", kFloat, kHalf));
  return all;
}

}  // namespace qcompile
