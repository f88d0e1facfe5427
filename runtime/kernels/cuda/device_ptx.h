// The device layer under nvcc: inline PTX. Include device.h instead; emulator.h has the same functions for g++.
//
// Unverified on GPU. Everything that touches shared memory is volatile and clobbers memory: the compiler keeps it in
// order with barriers and with the asynchronous copies, whose writes it cannot see.
#pragma once

#include <cstdint>

namespace qcompile::cuda {

QCOMPILE_DEVICE int thread_x() { return int(threadIdx.x); }
// The same, read anew: what depends on it is computed where it is used, and keeps no registers through a loop.
QCOMPILE_DEVICE int thread_x_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
QCOMPILE_DEVICE int block_x() { return int(blockIdx.x); }
QCOMPILE_DEVICE int block_y() { return int(blockIdx.y); }
QCOMPILE_DEVICE int block_z() { return int(blockIdx.z); }
QCOMPILE_DEVICE int grid_x() { return int(gridDim.x); }
QCOMPILE_DEVICE int grid_y() { return int(gridDim.y); }
QCOMPILE_DEVICE int grid_z() { return int(gridDim.z); }

QCOMPILE_DEVICE void block_barrier() { __syncthreads(); }
QCOMPILE_DEVICE void warp_barrier() { __syncwarp(); }
QCOMPILE_DEVICE void thread_fence() { __threadfence(); }

// Address of the dynamic shared memory, 1024-byte aligned.
QCOMPILE_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared));
}

// ---- Asynchronous copies of 16 bytes from global to shared memory; `bytes` (0 or 16) are copied, the rest becomes 0.

QCOMPILE_DEVICE void copy_async(uint32_t to, const void* from, uint32_t bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// A policy for what is read once: it leaves the second-level cache first.
QCOMPILE_DEVICE uint64_t once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

QCOMPILE_DEVICE void copy_async_once(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}

QCOMPILE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are on their way.
template <int pending>
QCOMPILE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Shared memory, 4, 8 or 16 bytes, aligned to their size.

QCOMPILE_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t a;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(address) : "memory");
  return a;
}

QCOMPILE_DEVICE Words2 load_shared_2(uint32_t address) {
  Words2 a;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a.x), "=r"(a.y) : "r"(address) : "memory");
  return a;
}

QCOMPILE_DEVICE Words4 load_shared_4(uint32_t address) {
  Words4 a;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w) : "r"(address) : "memory");
  return a;
}

QCOMPILE_DEVICE void store_shared(uint32_t address, uint32_t a) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(a) : "memory");
}

QCOMPILE_DEVICE void store_shared_2(uint32_t address, Words2 a) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(a.x), "r"(a.y) : "memory");
}

QCOMPILE_DEVICE void store_shared_4(uint32_t address, Words4 a) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w)
               : "memory");
}

// ---- Global memory. load_global: what this kernel does not write; load_global_written: what other CTAs wrote.

template <typename T>
QCOMPILE_DEVICE T load_global(const T* from) {
  return *from;
}

QCOMPILE_DEVICE Words4 load_global_written(const void* from) {
  Words4 a;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w) : "l"(from) : "memory");
  return a;
}

template <typename T>
QCOMPILE_DEVICE void store_global(T* to, T value) {
  *to = value;
}

// What was there before.
QCOMPILE_DEVICE uint32_t atomic_increment(uint32_t* counter) { return atomicAdd(counter, 1u); }

// ---- Operations of a warp: all 32 lanes call them together.

// ldmatrix: 8x8 matrices of 16-bit elements. Lanes 8 i … 8 i + 7 give the addresses of the rows of matrix i; lane l
// gets elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of each.
QCOMPILE_DEVICE void load_matrices_2(uint32_t address, uint32_t (&d)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1]) : "r"(address) : "memory");
}

QCOMPILE_DEVICE void load_matrices_4(uint32_t address, uint32_t (&d)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), c in fp32, a and b in fp16 or bf16.
template <bool bfloat>
QCOMPILE_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (bfloat) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

QCOMPILE_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
QCOMPILE_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

}  // namespace qcompile::cuda
