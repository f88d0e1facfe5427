// CUDA blocks on a CPU: the device layer of device.h for g++, so that the source of a kernel runs without a GPU.
//
// Each thread is a fiber; blocks run one after another, in an order and with threads interleaved as `seed` says. What a
// CPU would forgive is an error here: a copy read before the wait that covers it, shared memory never written, two
// threads at one word without a barrier between them, accesses out of bounds or misaligned, barriers that not all
// threads reach, and words of another block that were not published by a fence and an atomic.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../device.h"

namespace qcompile::cuda::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory that a kernel may touch.
class Globals {
 public:
  void add(const void* data, size_t bytes, const char* name) { ranges_.push_back({address(data), bytes, name, {}}); }
  void add_written(void* data, size_t bytes, const char* name) {
    ranges_.push_back({address(data), bytes, name, std::vector<Written>(bytes / 2 + 1)});
  }

  struct Written { int block = -1; uint32_t sequence = 0; };  // of 2 bytes: who wrote them last in a launch, and when
  struct Range { uintptr_t begin; size_t bytes; std::string name; std::vector<Written> written; };
  // The range that holds these bytes, or nullptr.
  Range* find(const void* data, size_t bytes);
  void forget();  // who wrote what: before a launch
  std::map<uintptr_t, std::vector<uint32_t>> atomics;  // by address: what those who changed it had published, by block

 private:
  static uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }
  std::vector<Range> ranges_;
};

struct Index { int x = 1, y = 1, z = 1; };

struct Launch {
  Index grid;
  int threads;
  int shared_bytes;
  uint64_t seed = 0;
};

// Runs `kernel` as every thread of the grid. Throws Error with block, thread, address and the reason.
void run(const Launch& launch, Globals& globals, const std::function<void()>& kernel);

// ---- What the functions of the device layer are made of (and those of emulator_sm90.h).

constexpr uint32_t kSharedBase = 1024;  // as on sm_90, where the first KB is the system's
constexpr uint8_t kPoison = 0xff;       // a NaN in fp32, fp16 and bf16

struct Fiber;
struct Copy { uint32_t to; const void* from; uint32_t bytes; };

struct Thread {
  int id = 0;
  Fiber* fiber = nullptr;
  bool done = false;
  std::string waits_for;                   // for the message of a deadlock
  std::vector<Copy> copies;                // asynchronous ones, in order of their issue
  std::vector<size_t> groups;              // how many of them each committed group has
  size_t uncommitted = 0;
  bool unfenced = false;                   // wrote global memory since its last fence
  // Order by other means than the block barrier (mbarriers): what of other threads happened before this thread's next
  // access. clock is its own time, seen[i] the time of thread i that it has seen. See release and acquire.
  uint32_t clock = 1;
  std::vector<uint32_t> seen;
};

struct Access { int thread; uint32_t clock; };
struct Word {                              // of shared memory
  int writer = -1;                         // -1: never written
  uint32_t write_interval = 0, write_clock = 0, read_interval = 0;
  bool in_flight = false;                  // an asynchronous copy to it has not landed
  std::vector<Access> readers;             // within read_interval
};

struct Rendezvous {
  std::string name;
  int arrived = 0;
  std::vector<void*> arguments;
};

struct Block {
  Launch launch;
  Index index;
  int number = 0;                          // in the grid
  Globals* globals = nullptr;
  std::vector<uint8_t> shared;
  std::vector<Word> words;
  uint32_t interval = 1;                   // between two block barriers; goes on from block to block
  std::vector<Thread> threads;
  std::map<std::pair<int, int>, Rendezvous> rendezvous;  // by first thread and count
  std::vector<std::function<void()>> deferred;           // work of asynchronous engines
  std::vector<int> ready;
  std::vector<std::pair<int, const std::function<bool()>*>> polled;
  uint32_t sequence = 0;                   // writes to global memory
  std::vector<uint32_t> published;         // by block: the sequence up to which this block may read its writes
  uint64_t random = 1;
};

Block& block();    // that runs now
Thread& self();    // that runs now

// Throws Error: "block (x, y, z) thread t (warp w, lane l): " + what. `thread` is self() unless told otherwise.
[[noreturn]] void fail(const std::string& what, const Thread* thread = nullptr);
std::string hex(uint32_t address);
uint32_t random_below(uint32_t n);

// Waits until threads first … first + count - 1 have all called this with the same name; the last one runs
// `all(arguments)` first, arguments in order of threads.
void meet(const char* name, int first, int count, void* argument, const std::function<void(void**)>& all);
inline void meet_warp(const char* name, void* argument, const std::function<void(void**)>& all) {
  meet(name, self().id / 32 * 32, 32, argument, all);
}

// Waits until `ready` returns true; whoever makes it so need not tell.
void wait_until(const char* name, const std::function<bool()>& ready);

// Work that an asynchronous engine does later: at a time drawn at random, at the latest when no thread can go on.
void defer(std::function<void()> work);

// Order between threads: everything that this thread did before release(to) happens before what a thread does after
// acquire(from) with the same vector of times.
void release(std::vector<uint32_t>& to);
void acquire(const std::vector<uint32_t>& from);

// Shared memory as `thread` sees it: bounds, alignment to `align`, races. note_write with in_flight = true poisons the
// bytes and forbids reading them until note_write with false.
uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t align, const Thread& thread);
void note_read(uint32_t address, uint32_t bytes, Thread& thread);
void note_write(uint32_t address, uint32_t bytes, Thread& thread, bool in_flight = false);
void read_shared(uint32_t address, void* out, uint32_t bytes, Thread& thread);
void write_shared(uint32_t address, const void* in, uint32_t bytes, Thread& thread);

void read_global(const void* from, void* out, uint32_t bytes);   // aligned to `bytes`
void write_global(void* to, const void* in, uint32_t bytes);
void check_global(const void* from, uint32_t bytes);             // of an asynchronous copy, aligned to 16

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat);
void load_matrices(uint32_t address, uint32_t* d, int count);
void copy_async(uint32_t to, const void* from, uint32_t bytes);
void copy_async_wait(size_t pending);

template <typename T>
T read_shared_as(uint32_t address) {
  T value;
  read_shared(address, &value, sizeof value, self());
  return value;
}

}  // namespace qcompile::cuda::emulator

#include "emulator_device.h"
