// Counters of CTAs that share a sum: zeros before a kernel and behind it, so that no product has to clear them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace qcompile::cuda {

// One buffer for each stream of a device, for products on one stream follow one another. Buffers are made with the
// first weight of the device, and handed to streams as they come; they live as long as the process, as streams may.
// A graph keeps the buffer of the stream that it was captured on: replay it on one stream at a time.
class Counters {
 public:
  static constexpr int kBuffers = 64;
  static constexpr int64_t kCount = 2048;  // plans split sums only where CTAs are few: 2 of each multiprocessor

  static Counters& of_device(int device) {
    static std::mutex mutex;
    static std::map<int, Counters>& all = *new std::map<int, Counters>;
    const std::lock_guard<std::mutex> lock(mutex);
    return all[device];
  }

  // Allocates on the current device; once.
  cudaError_t prepare() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (memory_) return cudaSuccess;
    constexpr size_t bytes = kBuffers * kCount * sizeof(uint32_t);
    void* memory = nullptr;
    if (const cudaError_t error = cudaMalloc(&memory, bytes)) return error;
    if (const cudaError_t error = cudaMemset(memory, 0, bytes)) return error;
    memory_ = static_cast<uint32_t*>(memory);
    return cudaSuccess;
  }

  // `count` zeros for a product on this stream, or nullptr: too many, too many streams, or a handle that stands for
  // another stream in each thread.
  uint32_t* of_stream(cudaStream_t stream, int64_t count) {
    if (count > kCount || stream == cudaStreamPerThread) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = index_.find(stream);
    if (known != index_.end()) return memory_ + known->second * kCount;
    if (!memory_ || index_.size() == kBuffers) return nullptr;
    const int index = int(index_.size());
    index_[stream] = index;
    return memory_ + index * kCount;
  }

 private:
  std::mutex mutex_;
  uint32_t* memory_ = nullptr;
  std::map<cudaStream_t, int> index_;
};

}  // namespace qcompile::cuda
