// What the emulated runtime knows and counts; for programs that look at it.
#pragma once

#include <cuda_runtime_api.h>

#include <map>

namespace qcompile::cuda::emulated {

struct Runtime {
  std::map<uint8_t*, size_t> allocations;
  size_t most_allocations = 1000;  // from then on memory is out
  int copies = 0;                  // between host and device
  int clears = 0;                  // of memory in a stream's order
  int device = 0;                  // the current one
  // In order of cudaDeviceAttr; small, so that products of a few columns are split.
  int attributes[8] = {8, 8, 6, 99 << 10, 100 << 10, 1000000, 256, 1500000};
};

Runtime& runtime();

// Whether all bytes lie in one allocation.
bool on_device(const void* memory, size_t bytes);

}  // namespace qcompile::cuda::emulated
