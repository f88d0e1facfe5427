// What an operator does with its node whatever computes it: failures, shapes, the checks of inputs and attributes.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "operators.h"
#include "packing.h"

namespace qcompile {

constexpr size_t kMaxRank = 32;

enum Input : size_t { kX, kW, kScale, kBias, kZeroPoint, kInputs };
constexpr Input kWeightInputs[] = {kW, kScale, kZeroPoint};

const char* name_of(Input input);

// ---- Failures: exceptions inside, an OrtStatus at the border. Nothing is thrown through C.

// A status of ONNX Runtime on its way back to it.
struct Failure {
  ort::OrtStatus* status;
};

inline void check(ort::OrtStatus* status) {
  if (status) throw Failure{status};
}

// Bad input, told in one line.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Body>
ort::OrtStatus* guarded(const ort::OrtApi& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const Refusal& refusal) {
    return api.call<ort::CreateStatus>(ort::ORT_INVALID_ARGUMENT, refusal.what());
  } catch (const std::bad_alloc&) {
    return api.call<ort::CreateStatus>(ort::ORT_FAIL, "qcompile: out of memory");
  } catch (const std::exception& error) {
    return api.call<ort::CreateStatus>(ort::ORT_FAIL, error.what());
  }
}

// ---- Shapes

// Of one tensor; −1 stands for a dimension that is not known yet.
struct Shape {
  std::array<int64_t, kMaxRank> dims{};
  size_t rank = 0;

  int64_t operator[](size_t i) const { return dims[i]; }
  std::string text() const;
};

using InfoOwner =
    std::unique_ptr<ort::OrtTensorTypeAndShapeInfo, ort::ReleaseTensorTypeAndShapeInfo::Function>;

InfoOwner own(const ort::OrtApi& api, ort::OrtTensorTypeAndShapeInfo* info);
Shape shape_of(const ort::OrtApi& api, const ort::OrtTensorTypeAndShapeInfo* info);
Shape shape_of(const ort::OrtApi& api, const ort::OrtValue* value);
void* data_of(const ort::OrtApi& api, const ort::OrtValue* value);

// ---- One node

// Refuses a node of a later version of the operators than this library computes.
void check_version(const std::string& label, int64_t version);

// Base of the kernels. What it refuses, it refuses in one line that names the node.
class Node {
 public:
  // Reads and checks the attributes.
  Node(const Operator& op, const ort::OrtKernelInfo* info);

  const ort::OrtApi& api() const { return api_; }

 protected:
  // What is known of the inputs: while the model loads, all of the constant ones and some shapes of the others.
  struct Given {
    bool present[kInputs] = {};
    std::optional<Shape> shape[kInputs];
    const ort::OrtValue* value[kInputs] = {};
  };

  bool takes(Input input) const { return input == kBias ? op_.bias : input != kZeroPoint || op_.of().zeros(); }
  int64_t element_bytes() const { return op_.element == ort::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2; }
  int64_t block_size() const { return block_size_; }
  int activation_bits() const { return activation_bits_; }
  // Begin and end of ranges of columns, one after another, whose activations take 8 bits whatever those of others take.
  const std::vector<int64_t>& columns_at_8() const { return columns_at_8_; }
  const Operator& op() const { return op_; }

  // Throws a Refusal: the node, then the text.
  template <typename... Values>
  [[noreturn]] void refuse(const char* format, Values... values) const;
  // "node 'NAME' (OPERATOR): "
  std::string label() const { return "node '" + name_ + "' (" + op_.name + "): "; }

  Given given_at_load(const ort::OrtKernelInfo* info) const;
  Given given_at_run(const ort::OrtKernelContext* context) const;
  // Refuses whatever cannot be right, whichever shapes are known.
  void check_shapes(const Given& given) const;
  // Refuses a bias of the run that is not (n,).
  void check_bias(const ort::OrtValue* bias, int64_t k, int64_t n) const;

  // (K, N) of the weight, by the shape of w: of fields of bits, an attribute says K.
  Shape weight_shape(const Shape& w) const;
  // The weight as packing reads it; w, scale and zero_point (where the node has one) must be given.
  Source source(const Given& given) const;
  // Tells the kernel of the system that the packed copy is what will be read from now on.
  void give_back(const Given& given) const;

  const ort::OrtValue* input(const ort::OrtKernelContext* context, Input input) const;
  // The output (…, n) of x (…, k), and the number of its rows.
  struct Output {
    ort::OrtValue* value;
    int64_t rows;
  };
  Output output(ort::OrtKernelContext* context, const ort::OrtValue* x, int64_t k, int64_t n) const;

 private:
  size_t position(Input input) const { return input == kZeroPoint && !op_.bias ? size_t(kBias) : size_t(input); }
  std::string node_name(const ort::OrtKernelInfo* info) const;
  int64_t attribute(const ort::OrtKernelInfo* info, const char* name, std::optional<int64_t> standard) const;
  std::vector<int64_t> attributes(const ort::OrtKernelInfo* info, const char* name) const;
  void check_attributes(const ort::OrtKernelInfo* info);
  void check_columns(int64_t n) const;
  int64_t check_rows(const Shape& x, int64_t k) const;

  const Operator& op_;
  const ort::OrtApi& api_;
  std::string name_;
  int64_t block_size_, rows_ = 0;
  int activation_bits_, exponent_ = 0;
  std::vector<int64_t> columns_at_8_;
};

template <typename... Values>
void Node::refuse(const char* format, Values... values) const {
  char what[512];
  std::snprintf(what, sizeof what, format, values...);
  throw Refusal(label() + what);
}

}  // namespace qcompile
