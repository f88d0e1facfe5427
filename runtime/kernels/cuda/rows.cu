// The kernels of rows.h for nvcc. Unverified on GPU.

#include "rows.h"

#include "launch.h"

namespace qcompile::cuda {
namespace {

template <Element element>
__global__ void __launch_bounds__(kRowThreads) prepare_kernel(Layout layout, const void* x, void* prepared,
                                                              float* row_factor) {
  prepare_row<element>(layout, x, prepared, row_factor);
}

template <Element element>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_kernel(Layout layout, const void* codes,
                                                                        const void* scales, const void* zeros,
                                                                        int64_t first, int64_t count, void* out) {
  dequantize_step<element>(layout, codes, scales, zeros, first, count, out);
}

template <Element element>
__global__ void __launch_bounds__(kRowThreads) finish_kernel(int64_t n, void* y, const float* row_factor,
                                                             const void* bias) {
  finish_row<element>(n, y, row_factor, bias);
}

struct Shape {
  dim3 grid;
  int threads, shared_bytes;
};

// The kernel of the element type, of the three in their order.
template <typename... Parameters>
cudaError_t launch(Element element, const Shape& shape, cudaStream_t stream, void (*half)(Parameters...),
                   void (*bfloat)(Parameters...), void (*single)(Parameters...), Parameters... arguments) {
  const auto kernel = element == Element::kHalf ? half : element == Element::kBfloat16 ? bfloat : single;
  kernel<<<shape.grid, shape.threads, size_t(shape.shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

template <typename... Parameters>
cudaError_t load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

template <Element element>
cudaError_t load_kernels() {
  const cudaError_t loaded[] = {load(prepare_kernel<element>), load(dequantize_kernel<element>),
                                load(finish_kernel<element>)};
  for (const cudaError_t error : loaded) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t load_row_kernels() {
  if (const cudaError_t error = load_kernels<Element::kHalf>()) return error;
  if (const cudaError_t error = load_kernels<Element::kBfloat16>()) return error;
  return load_kernels<Element::kFloat>();
}

cudaError_t launch_prepare(const Layout& layout, const void* x, int64_t m, void* prepared, float* row_factor,
                           cudaStream_t stream) {
  return launch(layout.element, {dim3(unsigned(m)), kRowThreads, kPrepareShared}, stream,
                prepare_kernel<Element::kHalf>, prepare_kernel<Element::kBfloat16>, prepare_kernel<Element::kFloat>,
                layout, x, prepared, row_factor);
}

cudaError_t launch_dequantize(const Layout& layout, const void* codes, const void* scales, const void* zeros,
                              int64_t first, int64_t count, void* out, cudaStream_t stream) {
  const dim3 grid(unsigned(layout.steps()), unsigned(round_up(count, kBlockN) / kBlockN));
  return launch(layout.element, {grid, kDequantizeThreads, kDequantizeShared}, stream,
                dequantize_kernel<Element::kHalf>, dequantize_kernel<Element::kBfloat16>,
                dequantize_kernel<Element::kFloat>, layout, codes, scales, zeros, first, count, out);
}

cudaError_t launch_finish(const Product& product, cudaStream_t stream) {
  return launch(product.layout.element, {dim3(unsigned(product.m)), kRowThreads, 0}, stream,
                finish_kernel<Element::kHalf>, finish_kernel<Element::kBfloat16>, finish_kernel<Element::kFloat>,
                product.layout.n, product.y, product.row_factor, product.bias);
}

}  // namespace qcompile::cuda
