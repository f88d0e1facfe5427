// A quantized weight on the device and its products: what the operators of the CUDA provider and the C functions call.
// Unverified on GPU; weight_check.cpp runs it on an emulated device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "../packing.h"
#include "layout.h"
#include "plan.h"

namespace qcompile::cuda {

// Device memory for the time of one product, and where it runs. allocate: 256-byte aligned, from an arena that may be
// used while a graph is captured; throws what it likes.
struct Call {
  cudaStream_t stream;
  std::function<void*(size_t bytes)> allocate;
};

class DeviceWeight {
 public:
  // Packs on the host (several threads), copies to the current device, and keeps nothing on the host. `source` may lie
  // in host or device memory. scale: fp16 for kHalf, bf16 for kBfloat16, fp32 for kFloat (source.scale_is_half says
  // which of the two widths). Throws std::runtime_error with CUDA's words, std::bad_alloc.
  DeviceWeight(const Layout& layout, const Source& source);
  ~DeviceWeight();
  DeviceWeight(const DeviceWeight&) = delete;
  DeviceWeight& operator=(const DeviceWeight&) = delete;

  // y (m, n) = x (m, k) W + bias (n,) or nullptr, device pointers to layout.element. No synchronization, no allocation
  // but through `call`. forced: -1 or a Route. Throws std::runtime_error.
  void multiply(const void* x, int64_t m, void* y, const void* bias, const Call& call, int forced = -1) const;

  // Bytes that `allocate` will be asked for in all at most, each request rounded up to 256. For x that is 16-byte
  // aligned; other x is copied.
  size_t scratch_bytes(int64_t m, int forced = -1) const;

  const Layout& layout() const { return layout_; }
  Plan plan(int64_t m, int forced = -1) const;

 private:
  void upload(const Source& source);
  void multiply_rows(const void* x, int64_t m, void* y, const void* bias, const Call& call, int forced) const;

  Layout layout_;
  int device_ = 0;
  Available available_;
  Machine machine_;
  uint8_t* memory_ = nullptr;  // codes, scales, zeros, each 256-byte aligned
};

// Of the current device. Throws std::runtime_error.
Machine this_machine();

// Devices that the driver shows; 0 where there is no driver.
int device_count();

}  // namespace qcompile::cuda
