// Plain C entry points of the CUDA side, for tests and benchmarks that need no ONNX Runtime (ctypes, torch pointers).
//
// Every build of the library has all of them. Without CUDA, or without a driver, those that need a device fail and
// qcompile_cuda_error() says why. element: 0 fp16, 1 bf16, 2 fp32. route: -1 for the plan's own, else a Route of plan.h.
#pragma once

#include <cstdint>

#include "../c_api.h"

// What went wrong last in this thread, or an empty string.
QCOMPILE_EXPORT const char* qcompile_cuda_error();

// Devices that can be used; 0 where there is no driver or the library was built without CUDA.
QCOMPILE_EXPORT int qcompile_cuda_devices();

// Architectures compiled in, such as "80,86,89,90a,90-virtual"; empty where the library was built without CUDA.
QCOMPILE_EXPORT const char* qcompile_cuda_architectures();

// ---- Host only: host_c_api.cpp

// layout: group, padded_k, padded_n, groups, codes_bytes, scales_bytes, zeros_bytes, takes_x_as_it_is. Returns 0, or 1
// for absurd numbers.
QCOMPILE_EXPORT int qcompile_cuda_layout(int64_t k, int64_t n, int64_t block_size, int bits, int element,
                                         int64_t layout[8]);

// Packs on the host. codes, scale, zero_point as in packing.h, scale of the width of the element (fp16, bf16, fp32).
QCOMPILE_EXPORT int qcompile_cuda_pack(int64_t k, int64_t n, int64_t block_size, int bits, int element, int is_signed,
                                       const void* codes, const void* scale, const void* zero_point, void* packed_codes,
                                       void* packed_scales, void* packed_zeros);

// The packed weight back as w (k, n) fp32.
QCOMPILE_EXPORT int qcompile_cuda_unpack(int64_t k, int64_t n, int64_t block_size, int bits, int element,
                                         const void* packed_codes, const void* packed_scales, const void* packed_zeros,
                                         float* w);

// machine: multiprocessors, architecture, shared_bytes, shared_total. available: bit 0 cuBLAS, bit 1 Hopper kernels.
// plan: route, tokens, block_n, stages, threads, split, grid_n, grid_m, shared_bytes, chunk, scratch_bytes, counters.
// Returns 0, or 1 where no plan exists.
QCOMPILE_EXPORT int qcompile_cuda_plan(int64_t k, int64_t n, int64_t block_size, int bits, int element, int64_t m,
                                       const int64_t machine[4], double bytes_per_second, double half_per_second,
                                       int available, int route, int64_t plan[12], double* predicted_seconds);

// ---- On a device: device_c_api.cpp

// A weight on the current device, or nullptr. codes, scale, zero_point: host or device memory.
QCOMPILE_EXPORT void* qcompile_cuda_weight_create(int64_t k, int64_t n, int64_t block_size, int bits, int element,
                                                  int is_signed, const void* codes, const void* scale,
                                                  const void* zero_point);
QCOMPILE_EXPORT void qcompile_cuda_weight_destroy(void* weight);
QCOMPILE_EXPORT int64_t qcompile_cuda_weight_bytes(const void* weight);

// Bytes of scratch that a product of m rows takes, -1 for bad arguments; its plan as in qcompile_cuda_plan (or nullptr).
QCOMPILE_EXPORT int64_t qcompile_cuda_weight_scratch(const void* weight, int64_t m, int route, int64_t plan[12]);

// y (m, n) = x (m, k) W + bias on a cudaStream_t; pointers to device memory, scratch 256-byte aligned. Does not
// synchronize. Returns 0, or 1.
QCOMPILE_EXPORT int qcompile_cuda_weight_multiply(const void* weight, const void* x, int64_t m, void* y,
                                                  const void* bias, void* stream, void* scratch, int64_t scratch_bytes,
                                                  int route);
