#include "cublas.h"

#include <dlfcn.h>

#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace qcompile::cuda {
namespace {

// ---- The functions that are used, declared after NVIDIA's documentation; the toolkit may lack the header.

using Handle = void*;
constexpr int kOpN = 0, kOpT = 1;  // cublasOperation_t
constexpr int kCompute32F = 68;    // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;
constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;  // cudaDataType_t
// cublasMath_t: sums that are cut over k are added in fp32, though y is fp16.
constexpr int kNoReducedPrecision = 16;

struct Functions {
  int (*create)(Handle*);
  int (*set_stream)(Handle, cudaStream_t);
  int (*set_workspace)(Handle, void*, size_t);
  int (*set_math_mode)(Handle, int);
  // op a, op b; m, n, k; alpha; a, its type, its stride; b; beta; c; type of sums, algorithm
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
              void*, int, int, int, int);
};

// A library that the process has already (ONNX Runtime's, PyTorch's) rather than another one of it.
void* open_library() {
  for (const int already : {RTLD_NOLOAD, 0}) {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL | already)) return library;
    }
  }
  return nullptr;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// nullptr if there is no cuBLAS.
const Functions* load() {
  static Functions functions;
  void* library = open_library();
  const bool found = library && find(library, "cublasCreate_v2", functions.create) &&
                     find(library, "cublasSetStream_v2", functions.set_stream) &&
                     find(library, "cublasSetWorkspace_v2", functions.set_workspace) &&
                     find(library, "cublasSetMathMode", functions.set_math_mode) &&
                     find(library, "cublasGemmEx", functions.gemm);
  return found ? &functions : nullptr;
}

const Functions* functions() {
  static const Functions* const loaded = load();
  return loaded;
}

void check(int status, const char* what) {
  if (status) throw std::runtime_error(std::string(what) + " of cuBLAS failed with status " + std::to_string(status));
}

// Handles live as long as the process: at its end the driver may be gone before them.
struct Handles {
  std::mutex mutex;
  std::map<int, Handle> of_device;  // nullptr where cuBLAS refused
};
Handles& handles() {
  static Handles& all = *new Handles;
  return all;
}

Handle make_handle(const Functions& cublas) {
  Handle handle = nullptr;
  if (cublas.create(&handle)) return nullptr;
  return cublas.set_math_mode(handle, kNoReducedPrecision) ? nullptr : handle;
}

int as_int(int64_t size) {
  if (size > std::numeric_limits<int>::max()) throw std::runtime_error("a size is too large for cuBLAS");
  return int(size);
}

}  // namespace

bool cublas_ready(int device) {
  const Functions* cublas = functions();
  if (!cublas) return false;
  const std::lock_guard<std::mutex> lock(handles().mutex);
  const auto known = handles().of_device.find(device);
  if (known != handles().of_device.end()) return known->second != nullptr;
  return (handles().of_device[device] = make_handle(*cublas)) != nullptr;
}

size_t cublas_workspace_bytes(int architecture) { return size_t(architecture == 90 ? 32 : 4) << 20; }

void cublas_multiply(int device, const CublasProduct& product, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream) {
  const Functions& cublas = *functions();
  const std::lock_guard<std::mutex> lock(handles().mutex);
  const Handle handle = handles().of_device.at(device);
  check(cublas.set_stream(handle, stream), "cublasSetStream");  // takes the workspace away, so this comes first
  check(cublas.set_workspace(handle, workspace, workspace_bytes), "cublasSetWorkspace");
  const int operand = product.element == Element::kBfloat16 ? kReal16BF : kReal16F;
  const int result = product.element == Element::kFloat ? kReal32F : operand;
  const float one = 1, zero = 0;
  // cuBLAS's matrices lie in columns: it computes yᵀ (n, m) = w xᵀ, and sees w as its transpose.
  check(cublas.gemm(handle, kOpT, kOpN, as_int(product.n), as_int(product.m), as_int(product.k), &one, product.w,
                    operand, as_int(product.k), product.x, operand, as_int(product.x_stride), &zero, product.y, result,
                    as_int(product.y_stride), kCompute32F, kDefaultAlgorithm),
        "cublasGemmEx");
}

}  // namespace qcompile::cuda
