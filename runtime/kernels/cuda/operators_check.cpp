// For tests without a GPU: the CUDA operators as ones of the CPU provider, and the C entry points of a device, with a
// DeviceWeight whose device is the host.
//
// What ONNX Runtime does with them is real: types, shapes, constants, scratch, failures. What a stream, a CUDA graph or
// memory of a device would do is not seen here.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../c_api.h"
#include "../half.h"
#include "operators.h"
#include "pack.h"
#include "weight.h"

namespace qcompile::cuda {
namespace {

float read(Element element, const void* data, int64_t i) {
  if (element == Element::kFloat) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (element == Element::kHalf) return half_to_float(bits);
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

void write(Element element, void* data, int64_t i, float value) {
  if (element == Element::kFloat) {
    static_cast<float*>(data)[i] = value;
  } else if (element == Element::kHalf) {
    static_cast<uint16_t*>(data)[i] = float_to_half(value);
  } else {  // to nearest, ties to even; no test has a NaN here
    uint32_t word;
    std::memcpy(&word, &value, 4);
    static_cast<uint16_t*>(data)[i] = uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
  }
}

Packed parts(const Layout& layout, uint8_t* memory) {
  return {memory, memory + layout.codes_bytes(), memory + layout.codes_bytes() + layout.scales_bytes()};
}

// Where a test wants to see what becomes of CUDA's failures: of making weights, or of multiplying.
bool fails(const char* where) {
  const char* wanted = std::getenv("QCOMPILE_CHECK_FAIL");
  return wanted && std::strcmp(wanted, where) == 0;
}

}  // namespace

DeviceWeight::DeviceWeight(const Layout& layout, const Source& source) : layout_(layout), machine_{} {
  if (fails("weight")) throw std::runtime_error("no CUDA-capable device is detected");
  memory_ = new uint8_t[size_t(layout.bytes())];
  pack_blocks(layout, source, 0, layout.blocks(), parts(layout, memory_));
}

DeviceWeight::~DeviceWeight() { delete[] memory_; }

// Of the decoded weight, and of the sums of a row.
size_t DeviceWeight::scratch_bytes(int64_t, int) const {
  return size_t(round_up(layout_.k * layout_.n * 4, 256) + round_up(layout_.n * 8, 256));
}

Plan DeviceWeight::plan(int64_t m, int forced) const {
  constexpr Machine kSome = {132, 90, 227 << 10, 228 << 10, 3e12, 8e14};
  return make_plan(layout_, m, kSome, {}, forced);
}

int device_count() { return 1; }

// All of the scratch is written.
void DeviceWeight::multiply(const void* x, int64_t m, void* y, const void* bias, const Call& call, int) const {
  if (fails("multiply")) throw std::runtime_error("an illegal memory access was encountered");
  const int64_t k = layout_.k, n = layout_.n;
  float* w = static_cast<float*>(call.allocate(size_t(k * n) * sizeof(float)));
  double* sums = static_cast<double*>(call.allocate(size_t(n) * sizeof(double)));
  unpack(layout_, parts(layout_, memory_), w);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t j = 0; j < n; ++j) sums[j] = bias ? double(read(layout_.element, bias, j)) : 0.0;
    for (int64_t i = 0; i < k; ++i) {
      const double value = read(layout_.element, x, row * k + i);
      for (int64_t j = 0; j < n; ++j) sums[j] += value * double(w[i * n + j]);
    }
    for (int64_t j = 0; j < n; ++j) write(layout_.element, y, row * n + j, float(sums[j]));
  }
}

}  // namespace qcompile::cuda

QCOMPILE_EXPORT qcompile::ort::OrtStatus* RegisterCustomOps(qcompile::ort::OrtSessionOptions* options,
                                                             const qcompile::ort::OrtApiBase* base) {
  using namespace qcompile::ort;
  const OrtApi& api = *base->GetApi(kApiVersion);
  static auto& operators = *new std::vector<qcompile::Operator>(qcompile::cuda::cuda_operators(api));
  OrtCustomOpDomain* domain;
  if (OrtStatus* status = api.call<CreateCustomOpDomain>("qcompile", &domain)) return status;
  for (qcompile::Operator& op : operators) {
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    if (OrtStatus* status = api.call<CustomOpDomain_Add>(domain, &op)) return status;
  }
  return api.call<AddCustomOpDomain>(options, domain);
}
