// The decode kernels for a device, and their launch. Unverified on GPU.
//
// Registers a thread, the most of sm_80 and sm_90a (nvcc 13.0); no stack, no spills. The build allows budgets.txt.
//   tokens          8        16       32       64
//   4 bits, 8 bits  96, 98   135, 148 179, 185 249, 251
#include <cuda_runtime_api.h>

#include "decode_epilogue.h"
#include "launch.h"

namespace qcompile::cuda {

namespace {

template <Element element, int bits, int MT>
__global__ void __launch_bounds__(Decode<element, bits, MT>::kThreads)
    decode_kernel(const __grid_constant__ DecodeArguments arguments) {
  decode<element, bits, MT>(arguments);
}

using Kernel = void (*)(DecodeArguments);

template <Element element, int bits>
Kernel kernel_of(int tokens) {
  switch (tokens) {
    case 8: return decode_kernel<element, bits, 1>;
    case 16: return decode_kernel<element, bits, 2>;
    case 32: return decode_kernel<element, bits, 4>;
    case 64: return decode_kernel<element, bits, 8>;
    default: return nullptr;
  }
}

template <int bits>
Kernel kernel_of(Element element, int tokens) {
  switch (element) {
    case Element::kHalf: return kernel_of<Element::kHalf, bits>(tokens);
    case Element::kBfloat16: return kernel_of<Element::kBfloat16, bits>(tokens);
    default: return kernel_of<Element::kFloat, bits>(tokens);
  }
}

Kernel kernel_of(Element element, int bits, int tokens) {
  return bits == 4 ? kernel_of<4>(element, tokens) : kernel_of<8>(element, tokens);
}

}  // namespace

// Of every kernel of the current device, as much as a block may have there: what a plan asks for is never more.
cudaError_t allow_shared_memory() {
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const cudaDeviceAttr limit = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, limit, device)) return error;
  for (const Element element : {Element::kHalf, Element::kBfloat16, Element::kFloat}) {
    for (const int bits : {4, 8}) {
      for (const int tokens : {8, 16, 32, 64}) {
        const int wanted = decode_shared_bytes(element, bits, tokens, kMaxStages);
        const cudaError_t error =
            cudaFuncSetAttribute(kernel_of(element, bits, tokens), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 wanted < most ? wanted : most);
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t launch_decode(const Plan& plan, const Product& product, cudaStream_t stream) {
  const Kernel kernel = kernel_of(product.layout.element, product.layout.bits, plan.tokens);
  constexpr int64_t kMostK = int64_t(1) << 21;  // of Decode::group_of
  if (!kernel || product.layout.padded_k > kMostK) return cudaErrorInvalidValue;
  const DecodeArguments arguments = decode_arguments(plan, product);
  const dim3 grid(unsigned(plan.grid_n), unsigned(plan.split), unsigned(plan.grid_m));
  kernel<<<grid, unsigned(plan.threads), size_t(plan.shared_bytes), stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace qcompile::cuda
