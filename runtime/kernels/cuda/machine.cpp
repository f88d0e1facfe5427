#include <algorithm>

#include "cuda_error.h"
#include "weight.h"

namespace qcompile::cuda {
namespace {

// Dense fp16 operations a clock of one multiprocessor with fp32 sums, from NVIDIA's data sheets: rate / (clock x
// multiprocessors). GeForce cards of 86, 89 and 120 have half of it.
double half_per_clock(int architecture) {
  if (architecture == 90) return 4096;
  if (architecture == 100 || architecture == 103) return 8192;
  return architecture == 80 ? 2048 : 1024;
}

}  // namespace

Machine this_machine() {
  int device = 0;
  check(cudaGetDevice(&device), "no CUDA device");
  const auto ask = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cannot ask the device");
    return value;
  };
  Machine machine{};
  machine.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  machine.architecture = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  if (machine.architecture < 80) throw std::runtime_error("the device is older than sm_80 (Ampere)");
  machine.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  machine.shared_total = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  // kHz, bits; two transfers a clock. Some virtual and unified memories say 0: a plan for the slowest is still a plan.
  const double transfers = 2e3 * ask(cudaDevAttrMemoryClockRate);
  machine.bytes_per_second = std::max(1e11, transfers * ask(cudaDevAttrGlobalMemoryBusWidth) / 8);
  const double clock = std::max(1e9, 1e3 * ask(cudaDevAttrClockRate));
  machine.half_per_second = half_per_clock(machine.architecture) * clock * machine.multiprocessors;
  return machine;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

}  // namespace qcompile::cuda
