// For tests without a GPU: the CUDA operators as ones of the CPU provider, on the emulated device (emulated/).
//
// What ONNX Runtime does with them is real: types, shapes, constants, scratch, failures. So is all that the library
// does but its .cu files; there is no cuBLAS. What a GPU, its streams and its graphs would do is not seen here.

#include <stdexcept>
#include <vector>

#include "../../c_api.h"
#include "../cublas.h"
#include "../emulator/emulated/runtime.h"
#include "../operators.h"

namespace qcompile::cuda {

bool cublas_ready(int) { return false; }
size_t cublas_workspace_bytes(int) { return 0; }
void cublas_multiply(int, const CublasProduct&, void*, size_t, cudaStream_t) { throw std::runtime_error("no cuBLAS"); }

}  // namespace qcompile::cuda

// From `count` allocations on, device memory is out.
QCOMPILE_EXPORT void qcompile_check_limit(int64_t count) {
  qcompile::cuda::emulated::runtime().most_allocations = size_t(count);
}

// Allocations of device memory that were not freed.
QCOMPILE_EXPORT int64_t qcompile_check_allocations() {
  return int64_t(qcompile::cuda::emulated::runtime().allocations.size());
}

// The device that is current from now on: one that a weight does not lie on fails its products.
QCOMPILE_EXPORT void qcompile_check_device(int device) { qcompile::cuda::emulated::runtime().device = device; }

// The architecture (86, 90) of the device of weights made from now on, with its shared memory.
QCOMPILE_EXPORT void qcompile_check_architecture(int architecture) {
  int(&attributes)[8] = qcompile::cuda::emulated::runtime().attributes;
  attributes[cudaDevAttrComputeCapabilityMajor] = architecture / 10;
  attributes[cudaDevAttrComputeCapabilityMinor] = architecture % 10;
  attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = (architecture == 90 ? 227 : 99) << 10;
  attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor] = (architecture == 90 ? 228 : 100) << 10;
}

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
