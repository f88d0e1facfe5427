// Operators that pack nothing: the halves of a product that gate each other, channels turned in blocks, and lookups in a
// quantized table.

#include "light.h"

#include <algorithm>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace qcompile {
namespace {

using namespace ort;

// ---- SwiGLU: x (…, 2 n) -> silu(x[…, :n]) * x[…, n:], (…, n)

class SwiGLU {
 public:
  SwiGLU(const LightOperator& op, const OrtKernelInfo* info) : op_(op), kernels_(chosen_kernels()) {
    check_attributes(op, info);
    if (!kernels_) refuse(op, "QCOMPILE_KERNEL was changed since the library was registered: it may be %s", kernel_names());
  }
  const OrtApi& api() const { return *op_.api; }
  void compute(OrtKernelContext* context) const;

 private:
  void compute_halves(const uint16_t* x, uint16_t* y, int64_t n) const;

  const LightOperator& op_;
  const Kernels* kernels_;
};

void SwiGLU::compute(OrtKernelContext* context) const {
  const OrtValue* value = input(op_, context, 0);
  Shape shape = shape_of(api(), value);
  if (shape.rank == 0 || shape[shape.rank - 1] % 2) {
    refuse(op_, "x has shape %s, its last dimension must be even", shape.text().c_str());
  }
  const int64_t rows = product(shape, shape.rank - 1), n = shape.dims[shape.rank - 1] /= 2;
  const void* x = data_of(api(), value);
  void* y = output(op_, context, shape);
  for_all(op_, context, rows, rows * n, [&](int64_t row) {
    if (op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      const float* gate = static_cast<const float*>(x) + row * 2 * n;
      kernels_->swiglu(gate, gate + n, static_cast<float*>(y) + row * n, n);
    } else {
      compute_halves(static_cast<const uint16_t*>(x) + row * 2 * n, static_cast<uint16_t*>(y) + row * n, n);
    }
  });
}

void SwiGLU::compute_halves(const uint16_t* x, uint16_t* y, int64_t n) const {
  constexpr int64_t kRun = 512;
  float gate[kRun], up[kRun], result[kRun];
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = std::min(kRun, n - begin);
    kernels_->from_half(x + begin, gate, count);
    kernels_->from_half(x + n + begin, up, count);
    kernels_->swiglu(gate, up, result, count);
    kernels_->to_half(result, y + begin, count);
  }
}

OrtStatus* infer_swiglu(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi& api = *static_cast<const LightOperator*>(self)->api;
  return guarded(api, [&] {
    const OrtTensorTypeAndShapeInfo* x = input_info(api, context, 0);
    Shape y = shape_of(api, x);
    if (y.rank == 0) return;
    int64_t& last = y.dims[y.rank - 1];
    if (last >= 0) last /= 2;
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(x, &type));
    infer_output(api, context, x, y.rank - 1, y, type);
  });
}

// ---- Hadamard: x (…, K), matrix (B, B) = diag(signs) H -> (…, K), each block of B channels times the matrix

class Hadamard {
 public:
  Hadamard(const LightOperator& op, const OrtKernelInfo* info) : op_(op), kernels_(chosen_kernels()) {
    check_attributes(op, info);
    if (!kernels_) refuse(op, "QCOMPILE_KERNEL was changed since the library was registered: it may be %s", kernel_names());
    int is_constant = 0;
    const OrtValue* matrix = nullptr;
    check(api().call<KernelInfoGetConstantInput_tensor>(info, kMatrix, &is_constant, &matrix));
    if (!is_constant) refuse(op, "matrix must be an initializer");
    read_signs(matrix);
  }
  const OrtApi& api() const { return *op_.api; }
  void compute(OrtKernelContext* context) const;

 private:
  enum Operand : size_t { kX, kMatrix };

  void read_signs(const OrtValue* matrix);
  void turn_halves(const uint16_t* x, uint16_t* y, int64_t n) const;

  const LightOperator& op_;
  const Kernels* kernels_;
  std::vector<float> signs_;  // (B,): the first column of the matrix
};

constexpr int64_t kMostChannels = 64;

void Hadamard::read_signs(const OrtValue* value) {
  const Shape shape = shape_of(api(), value);
  const int64_t block = shape.rank == 2 && shape[0] == shape[1] ? shape[0] : 0;
  if (block != 64 && block != 32 && block != 16) {
    refuse(op_, "matrix has shape %s, it must be (B, B) with B = 16, 32 or 64", shape.text().c_str());
  }
  std::vector<float> matrix(static_cast<size_t>(block * block));
  if (op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    std::copy_n(static_cast<const float*>(data_of(api(), value)), matrix.size(), matrix.begin());
  } else {
    kernels_->from_half(static_cast<const uint16_t*>(data_of(api(), value)), matrix.data(), block * block);
  }
  for (int64_t i = 0; i < block; ++i) {
    signs_.push_back(matrix[size_t(i * block)]);
    for (int64_t j = 0; j < block; ++j) {
      const float sign = __builtin_parityll(uint64_t(i & j)) ? -1.0f : 1.0f;
      if (!(matrix[size_t(i * block + j)] == sign * signs_.back())) refuse(op_, "matrix is no Hadamard matrix with signs");
    }
  }
}

void Hadamard::compute(OrtKernelContext* context) const {
  constexpr int64_t kPiece = 128 * kMostChannels;
  const OrtValue* value = input(op_, context, kX);
  const Shape shape = shape_of(api(), value);
  const int64_t block = int64_t(signs_.size());
  if (shape.rank == 0 || shape[shape.rank - 1] % block) {
    refuse(op_, "x has shape %s, its last dimension must be a multiple of %lld", shape.text().c_str(), (long long)block);
  }
  const int64_t n = product(shape, shape.rank);
  void* result = output(op_, context, shape);
  if (n == 0) return;
  const void* x = data_of(api(), value);
  for_all(op_, context, div_up(n, kPiece), n, [&](int64_t piece) {
    const int64_t begin = piece * kPiece, count = std::min(kPiece, n - begin);
    if (op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      kernels_->hadamard(static_cast<const float*>(x) + begin, signs_.data(), static_cast<float*>(result) + begin, count, block);
    } else {
      turn_halves(static_cast<const uint16_t*>(x) + begin, static_cast<uint16_t*>(result) + begin, count);
    }
  });
}

void Hadamard::turn_halves(const uint16_t* x, uint16_t* y, int64_t n) const {
  constexpr int64_t kRun = 8 * kMostChannels;
  float numbers[kRun];
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = std::min(kRun, n - begin);
    kernels_->from_half(x + begin, numbers, count);
    kernels_->hadamard(numbers, signs_.data(), numbers, count, int64_t(signs_.size()));
    kernels_->to_half(numbers, y + begin, count);
  }
}

OrtStatus* infer_hadamard(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi& api = *static_cast<const LightOperator*>(self)->api;
  return guarded(api, [&] {
    const OrtTensorTypeAndShapeInfo* x = input_info(api, context, 0);
    const Shape y = shape_of(api, x);
    if (y.rank == 0) return;
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(x, &type));
    infer_output(api, context, x, y.rank, y, type);
  });
}

// ---- EmbeddingF: indices (…), w (K, V), scale (G, V), zero_point (G, V) -> (…, K), columns of the table decoded

enum Lookup : size_t { kIndices, kTable, kScales, kZeros };

class Embedding {
 public:
  Embedding(const LightOperator& op, const OrtKernelInfo* info) : op_(op) {
    check_attributes(op, info);
    if (OrtStatus* missing = api().call<KernelInfoGetAttribute_int64>(info, "block_size", &block_size_)) throw Failure{missing};
    if (block_size_ < 1) refuse(op, "block_size is %lld: compile the model again", (long long)block_size_);
  }
  const OrtApi& api() const { return *op_.api; }
  void compute(OrtKernelContext* context) const;

 private:
  // What the table is made of. Of 4 bits, w and zeros have ceil(v / 2) bytes a row.
  struct Table {
    int64_t k, v;
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;  // nullptr: there are none, as in tables of levels

    int64_t groups(int64_t block_size) const { return div_up(k, block_size); }
  };
  static constexpr int64_t kTogether = 16;  // columns that are decoded side by side: what they are written to stays near

  Table table(const OrtKernelContext* context) const;
  int64_t column(const void* indices, int64_t i, int64_t v) const;
  void decode(const Table& table, const int64_t* columns, int64_t count, uint8_t* y) const;

  const LightOperator& op_;
  int64_t block_size_ = 0;
};

Embedding::Table Embedding::table(const OrtKernelContext* context) const {
  const Format& format = kFormats[op_.format];
  const OrtValue *codes = input(op_, context, kTable), *scales = input(op_, context, kScales);
  const OrtValue* zeros = format.affine ? input(op_, context, kZeros) : nullptr;
  const Shape w = shape_of(api(), codes), scale = shape_of(api(), scales);
  if (w.rank != 2 || scale.rank != 2) refuse(op_, "w and scale must have 2 dimensions: compile the model again");
  const Table table = {w[0], scale[1], static_cast<const uint8_t*>(data_of(api(), codes)), data_of(api(), scales),
                       zeros ? static_cast<const uint8_t*>(data_of(api(), zeros)) : nullptr};
  const int64_t bytes = format.bits == 4 ? div_up(table.v, 2) : table.v, groups = table.groups(block_size_);
  const Shape zero = zeros ? shape_of(api(), zeros) : Shape{{groups, bytes}, 2};
  if (w[1] != bytes || scale[0] != groups || zero.rank != 2 || zero[0] != groups || zero[1] != bytes) {
    refuse(op_, "w %s, scale %s and zero_point %s with block_size %lld do not fit: compile the model again",
           w.text().c_str(), scale.text().c_str(), zero.text().c_str(), (long long)block_size_);
  }
  return table;
}

// Negative indices count from the end.
int64_t Embedding::column(const void* indices, int64_t i, int64_t v) const {
  const int64_t index = op_.index == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? static_cast<const int32_t*>(indices)[i]
                                                                         : static_cast<const int64_t*>(indices)[i];
  if (index < -v || index >= v) {
    refuse(op_, "index %lld is out of bounds, the table has %lld entries", (long long)index, (long long)v);
  }
  return index < 0 ? index + v : index;
}

void Embedding::compute(OrtKernelContext* context) const {
  const OrtValue* given = input(op_, context, kIndices);
  const Table table = this->table(context);
  Shape shape = shape_of(api(), given);
  const int64_t count = product(shape, shape.rank);
  if (shape.rank + 1 > kMaxRank) refuse(op_, "indices have too many dimensions");
  shape.dims[shape.rank++] = table.k;
  std::vector<int64_t> columns(static_cast<size_t>(count));
  const void* indices = count ? data_of(api(), given) : nullptr;
  for (int64_t i = 0; i < count; ++i) columns[size_t(i)] = column(indices, i, table.v);
  uint8_t* y = static_cast<uint8_t*>(output(op_, context, shape));
  const int64_t row_bytes = table.k * (op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2);
  for_all(op_, context, div_up(count, kTogether), count * table.k, [&](int64_t part) {
    const int64_t begin = part * kTogether;
    decode(table, columns.data() + begin, std::min(kTogether, count - begin), y + begin * row_bytes);
  });
}

// y (count, K): (integer - zero point) * scale, rounded once, as DequantizeLinear does.
void Embedding::decode(const Table& table, const int64_t* columns, int64_t count, uint8_t* y) const {
  const Format& format = kFormats[op_.format];
  const bool half = op_.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, nibbles = format.bits == 4;
  const int64_t bytes = nibbles ? div_up(table.v, 2) : table.v;
  const auto code_at = [&](const uint8_t* row, int64_t v) -> int {
    if (nibbles) return row[v / 2] >> (v % 2 * 4) & 15;
    return op_.is_signed ? int8_t(row[v]) : row[v];
  };
  float scale[kTogether];
  int zero[kTogether];
  for (int64_t k = 0; k < table.k; ++k) {
    if (const int64_t group = k / block_size_; k % block_size_ == 0) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = group * table.v + columns[i];
        scale[i] = half ? half_to_float(static_cast<const uint16_t*>(table.scales)[at])
                        : static_cast<const float*>(table.scales)[at];
        zero[i] = table.zeros ? code_at(table.zeros + group * bytes, columns[i]) : format.middle;
      }
    }
    const uint8_t* row = table.codes + k * bytes;
    for (int64_t i = 0; i < count; ++i) {
      const float value = float(format.integer(code_at(row, columns[i])) - zero[i]) * scale[i];
      const int64_t at = i * table.k + k;
      if (half) {
        reinterpret_cast<uint16_t*>(y)[at] = float_to_half(value);
      } else {
        reinterpret_cast<float*>(y)[at] = value;
      }
    }
  }
}

ONNXTensorElementDataType embedding_input(const OrtCustomOp* self, size_t index) {
  const LightOperator& op = *static_cast<const LightOperator*>(self);
  const auto codes = op.is_signed ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  return index == kIndices ? op.index : index == kScales ? op.element : codes;
}

OrtStatus* infer_embedding(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi& api = *static_cast<const LightOperator*>(self)->api;
  return guarded(api, [&] {
    const OrtTensorTypeAndShapeInfo* indices = input_info(api, context, kIndices);
    Shape y = shape_of(api, indices);
    const Shape w = shape_of(api, input_info(api, context, kTable));
    if (y.rank == 0 || w.rank != 2 || w[0] < 0 || y.rank + 1 > kMaxRank) return;  // a scalar looks like an unknown rank
    y.dims[y.rank] = w[0];
    ONNXTensorElementDataType type;
    check(api.call<GetTensorElementType>(input_info(api, context, kScales), &type));
    infer_output(api, context, indices, y.rank++, y, type);
  });
}

// ---- The table of all

LightOperator make_swiglu(const OrtApi& api, ONNXTensorElementDataType element) {
  LightOperator op = make(api, "SwiGLU", element);
  op.GetInputType = [](const OrtCustomOp* op, size_t) { return static_cast<const LightOperator*>(op)->element; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.InferOutputShapeFn = infer_swiglu;
  run_with<SwiGLU>(op);
  return op;
}

LightOperator make_hadamard(const OrtApi& api, ONNXTensorElementDataType element) {
  LightOperator op = make(api, "Hadamard", element);
  op.GetInputType = [](const OrtCustomOp* op, size_t) { return static_cast<const LightOperator*>(op)->element; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(2); };
  op.InferOutputShapeFn = infer_hadamard;
  run_with<Hadamard>(op);
  return op;
}

LightOperator make_embedding(const OrtApi& api, int format, ONNXTensorElementDataType element,
                             ONNXTensorElementDataType index, bool is_signed) {
  LightOperator op = make(api, std::string("Embedding") + kFormats[format].word, element);
  op.format = format;
  op.index = index;
  op.is_signed = is_signed;
  op.GetInputType = embedding_input;
  op.GetInputTypeCount = [](const OrtCustomOp* op) {
    return size_t(kFormats[static_cast<const LightOperator*>(op)->format].affine ? 4 : 3);
  };
  op.InferOutputShapeFn = infer_embedding;
  run_with<Embedding>(op);
  return op;
}

}  // namespace

std::vector<LightOperator> light_operators(const OrtApi& api) {
  std::vector<LightOperator> all;
  for (auto element : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}) {
    all.push_back(make_swiglu(api, element));
    all.push_back(make_hadamard(api, element));
    for (int format = 0; format < kFormatCount; ++format) {
      // Of scales in bytes, an attribute says the type of the output: no inputs tell it. Fields of bits are left to their bodies.
      if (kFormats[format].byte_scales() || kFormats[format].in_fields()) continue;
      for (auto index : {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}) {
        all.push_back(make_embedding(api, format, element, index, false));
        const bool bytes = kFormats[format].affine && kFormats[format].bits == 8;  // tables of qdq and dynamic are signed
        if (bytes) all.push_back(make_embedding(api, format, element, index, true));
      }
    }
  }
  return all;
}

}  // namespace qcompile
