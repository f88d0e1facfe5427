// The functions of cuda_runtime_api.h beside this.

#include "runtime.h"

#include <cstdlib>
#include <cstring>

namespace qcompile::cuda::emulated {

Runtime& runtime() {
  static Runtime one;
  return one;
}

bool on_device(const void* memory, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(memory);
  for (const auto& [data, size] : runtime().allocations) {
    if (begin >= data && begin + bytes <= data + size) return true;
  }
  return false;
}

}  // namespace qcompile::cuda::emulated

using qcompile::cuda::emulated::on_device;
using qcompile::cuda::emulated::runtime;

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (runtime().allocations.size() >= runtime().most_allocations) return cudaErrorMemoryAllocation;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  if (!data) return cudaErrorMemoryAllocation;
  std::memset(data, 0xff, bytes);
  runtime().allocations[data] = bytes;
  *memory = data;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  if (!runtime().allocations.erase(static_cast<uint8_t*>(memory))) return cudaErrorInvalidValue;
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (!on_device(kind == cudaMemcpyHostToDevice ? to : from, bytes)) return cudaErrorInvalidValue;
  ++runtime().copies;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (!on_device(memory, bytes)) return cudaErrorInvalidValue;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  ++runtime().clears;
  return cudaMemset(memory, value, bytes);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  attributes->type = on_device(memory, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = runtime().attributes[which];
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}
