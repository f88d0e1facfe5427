// The kernels of this folder as functions of device pointers and a stream. Nothing here allocates or synchronizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "layout.h"
#include "plan.h"
#include "product.h"

namespace qcompile::cuda {

// Asks once for the shared memory that the kernel of a plan needs; before any capture.
cudaError_t allow_shared_memory();

// Brings the code of prepare, dequantize and finish to the device, which is else done at the first launch; before any
// capture.
cudaError_t load_row_kernels();

// The same for the Hopper kernels, and the driver's function that describes x to them; on sm_90 only.
cudaError_t allow_hopper();

cudaError_t launch_decode(const Plan& plan, const Product& product, cudaStream_t stream);
cudaError_t launch_hopper(const Plan& plan, const Product& product, cudaStream_t stream);

// x (m, k) of layout.element -> (m, padded_k) fp16 or bf16, rows where the packed weight has them; kFloat: each row
// divided by the power of two 2^e that leaves its largest magnitude in [2^14, 2^15), row_factor[row] = 2^e.
cudaError_t launch_prepare(const Layout& layout, const void* x, int64_t m, void* prepared, float* row_factor,
                           cudaStream_t stream);

// Columns [first, first + count) of the weight as (count, padded_k) fp16 or bf16, scales multiplied in; for cuBLAS.
cudaError_t launch_dequantize(const Layout& layout, const void* codes, const void* scales, const void* zeros,
                              int64_t first, int64_t count, void* out, cudaStream_t stream);

// y (m, n) = y * row_factor + bias, in place, for routes whose product has no epilogue of its own.
cudaError_t launch_finish(const Product& product, cudaStream_t stream);

}  // namespace qcompile::cuda
