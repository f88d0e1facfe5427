// cuBLAS as it is found at run time: the library is built without it, and works without it. Unverified on GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace qcompile::cuda {

// Whether products can be given to cuBLAS on the current device. The first call on a device loads the library and makes
// the device's handle; that allocates and synchronizes, so it belongs to where weights are made.
bool cublas_ready(int device);

// Scratch that cuBLAS is given for a product, which may so be captured in a graph: what NVIDIA recommends, 32 MB on
// Hopper, 4 MB elsewhere.
size_t cublas_workspace_bytes(int architecture);

struct CublasProduct {
  Element element;      // operands are fp16 or bf16, y fp32 for kFloat
  int64_t m, n, k;
  const void* x;        // (m, k), rows x_stride elements apart
  int64_t x_stride;
  const void* w;        // (n, k)
  void* y;              // (m, n), rows y_stride elements apart
  int64_t y_stride;
};

// y = x wᵀ, summed in fp32. cublas_ready(device) has returned true. Throws std::runtime_error. Threads take turns: they
// share the device's handle, which knows one stream and one workspace at a time, for as long as the launch takes.
void cublas_multiply(int device, const CublasProduct& product, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream);

}  // namespace qcompile::cuda
