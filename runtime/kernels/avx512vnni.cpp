// AVX512-VNNI, with codebooks looked up by shuffles of 16 bytes.

#include "vector512.h"

namespace qcompile {
namespace {

bool available() { return has_vnni(); }

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = {"avx512vnni", available, quantize, kOwnProducts, 64, expand, from_half, to_half, swiglu, hadamard,
                             Attend<AttentionSet>::run};

}  // namespace qcompile
