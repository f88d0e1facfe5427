// ONNX Runtime's intra-op pool.
#pragma once

#include <atomic>
#include <new>

#include "node.h"

namespace qcompile {

constexpr size_t kAsManyAsThreads = 0;

struct Pool {
  const ort::OrtApi& api;
  const ort::OrtKernelContext* context;
  void (*piece)(void* data, size_t index) = nullptr;
  void* data = nullptr;
  std::atomic<bool> out_of_memory{false};

  static void run(void* self, void (*piece)(void* data, size_t index), size_t total, void* data) {
    Pool& pool = *static_cast<Pool*>(self);
    pool.piece = piece;
    pool.data = data;
    const auto guarded_piece = [](void* self, size_t index) {
      Pool& pool = *static_cast<Pool*>(self);
      try {
        pool.piece(pool.data, index);
      } catch (const std::bad_alloc&) {
        pool.out_of_memory = true;
      }
    };
    check(pool.api.call<ort::KernelContext_ParallelFor>(pool.context, +guarded_piece, total, kAsManyAsThreads, self));
    if (pool.out_of_memory) throw std::bad_alloc();
  }
};

}  // namespace qcompile
