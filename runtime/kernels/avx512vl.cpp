// AVX512-VNNI on 256-bit registers: the code of AVX-VNNI on machines that have the instruction in EVEX encoding only.
// avx512vnni.cpp is faster wherever this runs; it is here so that vnni256.h is tested.

#include <cpuid.h>

#include "vnni256.h"

namespace qcompile {
namespace {

bool available() {
  unsigned a, b, c = 0, d;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

inline __m256i dot(__m256i sums, __m256i codes, __m256i activations) {
  return _mm256_dpbusd_epi32(sums, codes, activations);
}

}  // namespace

extern const Kernels kAvx512Vl;
const Kernels kAvx512Vl = {"avx512vl", available, quantize, kProducts<kTileRows>, kPairs, expand, from_half, to_half, swiglu, hadamard,
                        Attend<AttentionSet>::run};

}  // namespace qcompile
