// AVX512-VNNI and AVX512-VBMI, whose permutations look up 64 or 128 bytes of a codebook at once (Ice Lake, Zen 4 and later).

#include "vector512.h"

namespace qcompile {
namespace {

bool available() { return has_vnni() && __builtin_cpu_supports("avx512vbmi"); }

}  // namespace

extern const Kernels kAvx512Vbmi;
const Kernels kAvx512Vbmi = {"avx512vbmi", available, quantize, kOwnProducts, kMostPairs, expand, from_half, to_half, swiglu, hadamard,
                             Attend<AttentionSet>::run};

}  // namespace qcompile
