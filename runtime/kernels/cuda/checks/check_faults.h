// Kernels with one fault each, and what the emulator must say about it: what keeps cuda_check from passing by luck.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "../emulator/emulator.h"

namespace qcompile::cuda {

struct Fault {
  const char* name;
  const char* reason;  // part of the message; nullptr: there is no fault
};

// In this order: what small_kernel and shared_sum do wrong.
constexpr Fault kFaults[] = {
    {"none", nullptr},
    {"reads before the wait", "before the asynchronous copy of thread"},
    {"no barrier behind the wait", "with no barrier in between"},
    {"writes what others still read", "with no barrier in between"},
    {"out of bounds, shared", "is out of bounds"},
    {"out of bounds, global", "out of bounds"},
    {"misaligned, shared", "is not aligned to 16 bytes"},
    {"misaligned, global", "not aligned to 16"},
    {"never written", "which nothing has written"},
    {"a thread misses a barrier", "threads wait for ever"},
    {"lanes at different operations", "while others of its group are at"},
    {"a copy that nothing waits for", "exits with asynchronous copies"},
    {"writes what is read only", "which the kernel may only read"},
    {"two blocks write one word", "wrote, too"},
    {"no fence before the counter", "without a fence and an atomic"},
};
constexpr int kFirstSharedSum = 14;  // 0 and from here on

constexpr int kFaultThreads = 64;

// 64 threads copy 16 bytes each; each reads the row of the thread 32 on by ldmatrix, then writes its own.
inline void small_kernel(int fault, const uint8_t* in, uint32_t* out) {
  const uint32_t shared = shared_base(), thread = uint32_t(thread_x()), other = (thread + 32) % kFaultThreads;
  if (fault != 8) {
    copy_async(shared + thread * 16 + (fault == 6 ? 4 : 0), in + thread * 16 + (fault == 5 ? 16 : fault == 7 ? 4 : 0));
    copy_async_commit();
  }
  if (fault != 1 && fault != 11) copy_async_wait<0>();
  if (fault != 2 && (fault != 9 || thread != 7)) block_barrier();
  if (fault == 11) return;
  uint32_t row[4] = {};
  if (fault == 10 && thread % 2) shuffle(0, 0);
  load_matrices_4(shared + other * 16 + (fault == 4 ? 1024 : 0), row);
  if (fault != 3) block_barrier();
  store_shared(shared + thread * 16, row[0]);
  if (fault == 12) store_global(const_cast<uint8_t*>(in), uint8_t(0));
  store_global(out + (fault == 13 ? 0 : block_x() * kFaultThreads) + int(thread), row[0]);
}

// Blocks store one word a thread; the last one to count adds those of both.
inline void shared_sum(int fault, uint32_t* words, uint32_t* counter) {
  const int thread = thread_x();
  store_global(words + block_x() * kFaultThreads + thread, uint32_t(thread));
  if (fault != 14) thread_fence();
  block_barrier();
  if (thread == 0) store_shared(shared_base(), atomic_increment(counter));
  block_barrier();
  if (load_shared(shared_base()) != 1) return;
  const uint32_t sum = load_global(words + thread) + load_global(words + kFaultThreads + thread);
  store_global(words + block_x() * kFaultThreads + thread, sum);
}

// The message of what `kernel` does on two blocks, or an empty string.
inline std::string message_of(emulator::Globals& globals, const std::function<void()>& kernel) {
  try {
    emulator::run({{2, 1, 1}, kFaultThreads, 1024, 5}, globals, kernel);
    return "";
  } catch (const emulator::Error& error) {
    return error.what();
  }
}

inline std::string message_of_fault(int fault, bool sums) {
  alignas(16) static uint8_t in[1024];
  std::vector<uint32_t> out(2 * kFaultThreads), counter(1, 0);
  emulator::Globals globals;
  globals.add(in, sizeof in, "in");
  globals.add_written(out.data(), out.size() * 4, "out");
  globals.add_written(counter.data(), 4, "counter");
  if (sums) return message_of(globals, [&] { shared_sum(fault, out.data(), counter.data()); });
  return message_of(globals, [&] { small_kernel(fault, in, out.data()); });
}

// Whether the message is the one that the fault must have; prints it where it is not.
inline bool is_found(const char* name, const char* reason, const std::string& message) {
  const bool found = reason ? message.find(reason) != std::string::npos : message.empty();
  if (!found) std::printf("  FAILED faults: %s: '%s'\n", name, message.c_str());
  return found;
}

}  // namespace qcompile::cuda
