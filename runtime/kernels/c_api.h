// Plain C entry points for tests and benchmarks that need no ONNX Runtime. Applications use RegisterCustomOps instead.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define QCOMPILE_EXPORT extern "C" __declspec(dllexport)
#else
#define QCOMPILE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace qcompile {
// Version of the operators that this library computes: the version of the domain `qcompile` in a model's opset imports.
constexpr int kOperatorVersion = 1;
}  // namespace qcompile

QCOMPILE_EXPORT int qcompile_operator_version();

// Names of the instruction sets of this build that this machine runs, slowest first, separated by commas.
QCOMPILE_EXPORT const char* qcompile_kernels();

// The one that sessions get (see QCOMPILE_KERNEL), or an empty string.
QCOMPILE_EXPORT const char* qcompile_chosen_kernel();

// Words of the formats (formats.h) whose products the chosen kernel computes, separated by commas.
QCOMPILE_EXPORT const char* qcompile_formats();

// A packed weight for the named kernel, or nullptr if a name is unknown, the machine lacks it, or a number is absurd.
// format: its word. codes, scale, zero_point: as in packing.h; codes of a table are unsigned, without zero points.
// Of E4M3 scales, the tensor's is 1.
QCOMPILE_EXPORT void* qcompile_weight_create(const char* kernel, int64_t k, int64_t n, int64_t block_size,
                                             const char* format, int is_signed, const void* codes, const void* scale,
                                             int scale_is_half, const void* zero_point);
QCOMPILE_EXPORT void qcompile_weight_destroy(void* weight);
QCOMPILE_EXPORT int64_t qcompile_weight_bytes(const void* weight);

// w (K, N) as fp32, decoded from the packed weight.
QCOMPILE_EXPORT void qcompile_weight_unpack(const void* weight, float* w);

// y (m, N) = x (m, K) W + bias, on the calling thread. half: x, y and bias are fp16. Returns 0, or 1 for bad arguments.
QCOMPILE_EXPORT int qcompile_weight_multiply(const void* weight, const void* x, int half, int64_t m, void* y,
                                             const void* bias, int activation_bits);
