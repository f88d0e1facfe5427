// Instructions that only Hopper has (sm_90a): mbarriers, bulk copies and wgmma, as functions. Unverified on GPU.
//
// Names and operands follow the PTX ISA 9.0: mbarrier, cp.async.bulk, cp.async.bulk.tensor, setmaxnreg, wgmma. g++ gets
// the same functions from emulator_sm90.h. Shared memory is addressed by 32-bit addresses, as in device.h.
#pragma once

#include <cstdint>

#include "device.h"

#if !defined(__CUDACC__)
#include "emulator/emulator_sm90.h"
#else
#include <cuda.h>

namespace qcompile::cuda::sm90 {

using TensorMap = CUtensorMap;

// ---- mbarrier: a phase ends when `count` arrivals and all expected bytes are there.

QCOMPILE_DEVICE void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialized barriers visible to the copy engine; before the threads' own barrier.
QCOMPILE_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

QCOMPILE_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for `bytes` bytes of copies.
QCOMPILE_DEVICE void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, third, … phase. A new barrier counts as having ended
// a phase of parity 1.
QCOMPILE_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- bulk copies, one thread each; they complete on `barrier`.

// bytes: a multiple of 16; both addresses 16-byte aligned.
QCOMPILE_DEVICE void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
               : "memory");
}

// The box of `map` at element `column` of row `row`; what lies outside of the tensor arrives as zeros and counts, too.
QCOMPILE_DEVICE void copy_tile(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];" ::"r"(shared),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

QCOMPILE_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- registers and barriers of warpgroups

template <int kCount>
QCOMPILE_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
QCOMPILE_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Barrier `id` (1 … 15) of threads first … first + count - 1, whole warps.
QCOMPILE_DEVICE void threads_barrier(int id, int /* first */, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- wgmma

// Before wgmma reads registers that threads have written.
QCOMPILE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QCOMPILE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are under way.
template <int kPending>
QCOMPILE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Holds computations with these registers on their side of a fence or a wait; the compiler sees no dependence there.
template <int kCount>
QCOMPILE_DEVICE void settle(float (&registers)[kCount]) {
  QCOMPILE_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
QCOMPILE_DEVICE void settle(uint32_t (&registers)[kCount]) {
  QCOMPILE_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// d (64, T) += a (64, 16) b (16, T): a and d as warps hold them (warp w rows 16 w …), b where `descriptor` says.
// The text names every register: the macros only write those lists. Behind them stand a, the descriptor, a predicate
// (true: add to d), and the immediates +a, +b, b not transposed (that is, K-major).
#define QCOMPILE_FIVE(t, a, b, c, d, e) "%" t #a ",%" t #b ",%" t #c ",%" t #d ",%" t #e ","
#define QCOMPILE_TEN(t) QCOMPILE_FIVE(t, 0, 1, 2, 3, 4) QCOMPILE_FIVE(t, 5, 6, 7, 8, 9)
#define QCOMPILE_30 QCOMPILE_TEN("") QCOMPILE_TEN("1") QCOMPILE_TEN("2")
#define QCOMPILE_60 QCOMPILE_30 QCOMPILE_TEN("3") QCOMPILE_TEN("4") QCOMPILE_TEN("5")
#define QCOMPILE_90 QCOMPILE_60 QCOMPILE_TEN("6") QCOMPILE_TEN("7") QCOMPILE_TEN("8")
#define QCOMPILE_120 QCOMPILE_90 QCOMPILE_TEN("9") QCOMPILE_TEN("10") QCOMPILE_TEN("11")
#define QCOMPILE_LIST_64 QCOMPILE_30 "%30,%31"
#define QCOMPILE_LIST_128 QCOMPILE_60 "%60,%61,%62,%63"
#define QCOMPILE_LIST_256 QCOMPILE_120 "%120,%121,%122,%123,%124,%125,%126,%127"
#define QCOMPILE_INPUTS_64 "{%32,%33,%34,%35},%36"
#define QCOMPILE_INPUTS_128 "{%64,%65,%66,%67},%68"
#define QCOMPILE_INPUTS_256 "{%128,%129,%130,%131},%132"

#define QCOMPILE_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define QCOMPILE_D16(i) QCOMPILE_D4(i), QCOMPILE_D4((i) + 4), QCOMPILE_D4((i) + 8), QCOMPILE_D4((i) + 12)
#define QCOMPILE_D_64 QCOMPILE_D16(0), QCOMPILE_D16(16)
#define QCOMPILE_D_128 QCOMPILE_D_64, QCOMPILE_D16(32), QCOMPILE_D16(48)
#define QCOMPILE_D_256 QCOMPILE_D_128, QCOMPILE_D16(64), QCOMPILE_D16(80), QCOMPILE_D16(96), QCOMPILE_D16(112)

#define QCOMPILE_WGMMA(tokens, type)                                                                              \
  asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\twgmma.mma_async.sync.aligned.m64n" #tokens      \
               "k16.f32." type "." type " {" QCOMPILE_LIST_##tokens "}," QCOMPILE_INPUTS_##tokens ",add,1,1,0;\n\t}" \
               : QCOMPILE_D_##tokens                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))

template <bool kHalf, int kTokens>
QCOMPILE_DEVICE void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor) {
  static_assert(kTokens == 64 || kTokens == 128 || kTokens == 256, "no such tile");
  if constexpr (kTokens == 64 && kHalf) QCOMPILE_WGMMA(64, "f16");
  if constexpr (kTokens == 128 && kHalf) QCOMPILE_WGMMA(128, "f16");
  if constexpr (kTokens == 256 && kHalf) QCOMPILE_WGMMA(256, "f16");
  if constexpr (kTokens == 64 && !kHalf) QCOMPILE_WGMMA(64, "bf16");
  if constexpr (kTokens == 128 && !kHalf) QCOMPILE_WGMMA(128, "bf16");
  if constexpr (kTokens == 256 && !kHalf) QCOMPILE_WGMMA(256, "bf16");
}

}  // namespace qcompile::cuda::sm90

#endif
