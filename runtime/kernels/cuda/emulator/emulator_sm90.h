// The functions of device_sm90.h on top of the emulator. Include device_sm90.h instead.
//
// Copies land later, at a time drawn at random, and only then count for their barrier; until then their bytes are NaN
// and may not be read. wgmma reads its A registers and its tile when its group is waited for, and says so if they are
// not what they were when it was issued; its accumulators are NaN until then.
#pragma once

#include <cstdint>
#include <functional>

#include "emulator.h"

namespace qcompile::cuda::sm90 {

// What a CUtensorMap holds: a matrix (rows, columns) of 16-bit elements, rows `stride` bytes apart, copied in boxes
// whose rows are 128 bytes, with the 128-byte swizzle.
struct TensorMap {
  const void* base;
  int64_t columns, rows, stride;
  int box_columns, box_rows;
};

// Faults that a check can plant into the instructions of a kernel, to see that they are noticed.
enum class Fault {
  kNone,
  kNoFullWait,         // barrier_wait returns at once, but in thread 0
  kNoEmptyWait,        // barrier_wait returns at once in thread 0
  kWrongParity,        // barrier_wait waits for the other phase
  kWrongStride,        // descriptors say 512 bytes from 8 rows to the next
  kNoSwizzle,          // descriptors say that tiles are not swizzled
  kWrongAddress,       // descriptors of all operands of a step begin at its first
  kNoWgmmaWait,        // wgmma_wait<1> returns at once
  kNoFinalWait,        // wgmma_wait<0> returns at once
  kNoWgmmaFence,
  kNoThreadsBarrier,
  kFewerBytes,         // the barrier expects 16 bytes less than are copied
};
constexpr int kFaults = 12;

// Runs a kernel like emulator::run, and checks that no thread leaves wgmma behind that nothing waits for.
void run(const emulator::Launch& launch, emulator::Globals& globals, const std::function<void()>& kernel,
         Fault fault = Fault::kNone);

void barrier_init(uint32_t barrier, uint32_t count);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier);
void barrier_arrive_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);

void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
void copy_tile(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier);
inline void prefetch_map(const TensorMap*) {}

void warpgroup_meets(const char* name);
template <int kCount>
void registers_decrease() {
  warpgroup_meets("registers_decrease");
}
template <int kCount>
void registers_increase() {
  warpgroup_meets("registers_increase");
}
void threads_barrier(int id, int first, int count);

template <typename T, int kCount>
void settle(T (&)[kCount]) {}

void wgmma_fence();
void wgmma_commit();
void wgmma_wait_pending(int pending);
template <int kPending>
void wgmma_wait() {
  wgmma_wait_pending(kPending);
}
void wgmma_issue(float* d, const uint32_t* a, uint64_t descriptor, int tokens, bool half);
template <bool kHalf, int kTokens>
void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor) {
  static_assert(kTokens % 8 == 0 && kTokens <= 256, "no such tile");
  wgmma_issue(d, a, descriptor, kTokens, kHalf);
}

}  // namespace qcompile::cuda::sm90
