// AVX-VNNI: vpdpbusd in VEX encoding, for processors without AVX-512 (Alder Lake and later, Zen 5).
//
// No machine of the kind was at hand: this file was compiled, and its instructions read, but not run. Its source,
// vnni256.h, is tested through avx512vl.cpp.

#include <cpuid.h>

#include "vnni256.h"

namespace qcompile {
namespace {

bool available() {
  constexpr unsigned avx_vnni = 1u << 4;  // leaf 7.1, eax
  unsigned a, b, c = 0, d;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;  // asks the system as well
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx_vnni);
}

inline __m256i dot(__m256i sums, __m256i codes, __m256i activations) {
  return _mm256_dpbusd_avx_epi32(sums, codes, activations);
}

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = {"avxvnni", available, quantize, kProducts<kTileRows>, kPairs, expand, from_half, to_half, swiglu, hadamard,
                        Attend<AttentionSet>::run};

}  // namespace qcompile
