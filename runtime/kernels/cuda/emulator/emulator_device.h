// The functions of device_ptx.h, made of the emulator. Include device.h instead.
#pragma once

#include "emulator.h"

namespace qcompile::cuda {

inline int thread_x() { return emulator::self().id; }
inline int thread_x_anew() { return thread_x(); }
inline int block_x() { return emulator::block().index.x; }
inline int block_y() { return emulator::block().index.y; }
inline int block_z() { return emulator::block().index.z; }
inline int grid_x() { return emulator::block().launch.grid.x; }
inline int grid_y() { return emulator::block().launch.grid.y; }
inline int grid_z() { return emulator::block().launch.grid.z; }

inline void block_barrier() {
  emulator::meet("block_barrier", 0, emulator::block().launch.threads, nullptr,
                 [](void**) { ++emulator::block().interval; });
}
void warp_barrier();
void thread_fence();

inline uint32_t shared_base() { return emulator::kSharedBase; }

inline void copy_async(uint32_t to, const void* from, uint32_t bytes = 16) { emulator::copy_async(to, from, bytes); }
inline uint64_t once_policy() { return 0; }
inline void copy_async_once(uint32_t to, const void* from, uint64_t) { emulator::copy_async(to, from, 16); }
inline void copy_async_commit() {
  emulator::self().groups.push_back(emulator::self().uncommitted);
  emulator::self().uncommitted = 0;
}
template <int pending>
void copy_async_wait() {
  emulator::copy_async_wait(pending);
}

inline uint32_t load_shared(uint32_t address) { return emulator::read_shared_as<uint32_t>(address); }
inline Words2 load_shared_2(uint32_t address) { return emulator::read_shared_as<Words2>(address); }
inline Words4 load_shared_4(uint32_t address) { return emulator::read_shared_as<Words4>(address); }
inline void store_shared(uint32_t address, uint32_t a) { emulator::write_shared(address, &a, 4, emulator::self()); }
inline void store_shared_2(uint32_t address, Words2 a) { emulator::write_shared(address, &a, 8, emulator::self()); }
inline void store_shared_4(uint32_t address, Words4 a) { emulator::write_shared(address, &a, 16, emulator::self()); }

template <typename T>
T load_global(const T* from) {
  T value;
  emulator::read_global(from, &value, sizeof value);
  return value;
}
inline Words4 load_global_written(const void* from) { return load_global(static_cast<const Words4*>(from)); }
template <typename T>
void store_global(T* to, T value) {
  emulator::write_global(to, &value, sizeof value);
}
uint32_t atomic_increment(uint32_t* counter);

inline void load_matrices_2(uint32_t address, uint32_t (&d)[2]) { emulator::load_matrices(address, d, 2); }
inline void load_matrices_4(uint32_t address, uint32_t (&d)[4]) { emulator::load_matrices(address, d, 4); }

template <bool bfloat>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_add(c, a, {b0, b1}, bfloat);
}

uint32_t shuffle(uint32_t value, int lane);
uint32_t shuffle_xor(uint32_t value, int mask);

}  // namespace qcompile::cuda
