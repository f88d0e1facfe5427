// A libcublas.so.13 of five functions on host memory, so that cublas.cpp can be run without a GPU. Written after
// NVIDIA's documentation of them: matrices lie in columns, c (m, n) = op(a) (m, k) op(b) (k, n).

#include <cstdint>
#include <cstring>

#include "../../../half.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;
constexpr int kInvalid = 7;  // CUBLAS_STATUS_INVALID_VALUE

struct Context {
  const void* stream = nullptr;
  const void* workspace = nullptr;
  int math_mode = 0;
};

float read(int type, const void* data, int64_t i) {
  if (type == kReal32F) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == kReal16F) return qcompile::half_to_float(bits);
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

void write(int type, void* data, int64_t i, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (type == kReal32F) static_cast<float*>(data)[i] = value;
  else if (type == kReal16F) static_cast<uint16_t*>(data)[i] = qcompile::float_to_half(value);
  else static_cast<uint16_t*>(data)[i] = uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);  // no NaN comes here
}

}  // namespace

EXPORT int cublasCreate_v2(void** handle) { return *handle = new Context, 0; }

EXPORT int cublasSetStream_v2(void* handle, const void* stream) {
  auto* context = static_cast<Context*>(handle);
  context->stream = stream;
  context->workspace = nullptr;  // as cuBLAS does
  return 0;
}

EXPORT int cublasSetWorkspace_v2(void* handle, const void* workspace, size_t bytes) {
  static_cast<Context*>(handle)->workspace = bytes ? workspace : nullptr;
  return reinterpret_cast<uintptr_t>(workspace) % 256 ? kInvalid : 0;
}

EXPORT int cublasSetMathMode(void* handle, int mode) {
  static_cast<Context*>(handle)->math_mode = mode;
  return mode == 16 ? 0 : kInvalid;
}

EXPORT int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                        int type_a, int stride_a, const void* b, int type_b, int stride_b, const void* beta, void* c,
                        int type_c, int stride_c, int compute, int algorithm) {
  if (!static_cast<Context*>(handle)->workspace || compute != 68 || algorithm != -1) return kInvalid;
  if (stride_a < (op_a ? k : m) || stride_b < (op_b ? n : k) || stride_c < m) return kInvalid;
  const float scale = *static_cast<const float*>(alpha);
  if (*static_cast<const float*>(beta) != 0) return kInvalid;
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t row = 0; row < m; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at_a = op_a ? row * stride_a + i : i * stride_a + row;
        const int64_t at_b = op_b ? i * stride_b + column : column * stride_b + i;
        sum += double(read(type_a, a, at_a)) * double(read(type_b, b, at_b));
      }
      write(type_c, c, column * stride_c + row, scale * float(sum));
    }
  }
  return 0;
}
