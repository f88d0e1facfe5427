// The Hopper kernels and their launch, for sm_90a. For other architectures the kernels are empty. Unverified on GPU.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "hopper.h"
#include "launch.h"

namespace qcompile::cuda {

namespace {

// One CTA a multiprocessor: without that bound setmaxnreg does nothing.
template <Element kElement, int kTokens>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    hopper_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ hopper::Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  hopper::product<kElement, kTokens>(&map, arguments);
#endif
}

// A kernel and the devices (bits) on which it may use the shared memory that it needs.
struct Kernel {
  void (*function)(CUtensorMap, hopper::Arguments);
  Element element;
  int tokens;
  std::atomic<uint64_t> allowed{0};
};

template <Element kElement, int kTokens>
Kernel kernel{hopper_kernel<kElement, kTokens>, kElement, kTokens};

Kernel* const kKernels[] = {
    &kernel<Element::kHalf, 64>,      &kernel<Element::kHalf, 128>,      &kernel<Element::kHalf, 256>,
    &kernel<Element::kBfloat16, 64>,  &kernel<Element::kBfloat16, 128>,  &kernel<Element::kBfloat16, 256>,
};

Kernel* find_kernel(Element element, int tokens) {
  for (Kernel* candidate : kKernels) {
    if (candidate->element == element && candidate->tokens == tokens) return candidate;
  }
  return nullptr;
}

cudaError_t allow_shared(Kernel& kernel) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (kernel.allowed & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(hopper::shared_bytes(kernel.tokens)));
  if (error == cudaSuccess) kernel.allowed |= bit;
  return error;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, without linking to it: the library loads where there is none.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // it is told by the launch, and only there
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? Encode(function) : nullptr;
}

Encode known_encode() {
  static const Encode encode = find_encode();
  return encode;
}

// x (m, padded_k) in boxes of (tokens, 64): rows of 128 bytes, swizzled as wgmma reads them, zeros behind the last row.
cudaError_t describe_x(const Product& product, int tokens, CUtensorMap* map) {
  const Encode encode = known_encode();
  if (!encode) return cudaErrorSymbolNotFound;
  const bool half = product.layout.element == Element::kHalf;
  const cuuint64_t sizes[2] = {cuuint64_t(product.layout.padded_k), cuuint64_t(product.m)};
  const cuuint64_t stride[1] = {cuuint64_t(product.x_stride) * 2};  // of rows, in bytes; that of columns is implied
  const cuuint32_t box[2] = {kStepK, cuuint32_t(tokens)}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
             const_cast<void*>(product.x), sizes, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t allow_hopper() {
  for (Kernel* each : kKernels) {
    if (const cudaError_t error = allow_shared(*each)) return error;
  }
  return known_encode() ? cudaSuccess : cudaErrorSymbolNotFound;
}

cudaError_t launch_hopper(const Plan& plan, const Product& product, cudaStream_t stream) {
  Kernel* const kernel = find_kernel(product.layout.element, plan.tokens);
  if (!kernel || !hopper::supports(product.layout) || plan.split < 1) return cudaErrorNotSupported;
  cudaError_t error = allow_shared(*kernel);
  if (error != cudaSuccess) return error;
  CUtensorMap map;
  error = describe_x(product, plan.tokens, &map);
  if (error != cudaSuccess) return error;
  hopper::Arguments arguments = hopper::arguments_of(product);
  void* parameters[] = {&map, &arguments};
  const dim3 grid(unsigned(plan.grid_n), unsigned(plan.split), unsigned(plan.grid_m)), block(hopper::kThreads);
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel->function), grid, block, parameters,
                          size_t(hopper::shared_bytes(plan.tokens)), stream);
}

}  // namespace qcompile::cuda
