// Operations of a warp, by the fragment maps of the PTX ISA; fences and atomics.

#include <algorithm>

#include "../device.h"

namespace qcompile::cuda {

namespace emulator {

namespace {

// The numbers of all 65,536 patterns.
struct Numbers {
  std::vector<float> half = std::vector<float>(65536), bfloat = std::vector<float>(65536);
  Numbers() {
    for (uint32_t i = 0; i < 65536; ++i) half[i] = half_number(uint16_t(i)), bfloat[i] = bfloat_number(uint16_t(i));
  }
};

struct Multiply {
  float* c;
  const uint32_t *a, *b;
};

// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4, t = lane % 4,
//   A: registers 0, 1 columns 2 t, 2 t + 1 of rows g, g + 8; registers 2, 3 the same 8 columns on
//   B: registers 0, 1 rows 2 t, 2 t + 1 of column g, and the same 8 rows on
//   C: 0, 1 columns 2 t, 2 t + 1 of row g; 2, 3 of row g + 8
void multiply_all(void** lanes, bool bfloat) {
  static const Numbers numbers;
  const std::vector<float>& number = bfloat ? numbers.bfloat : numbers.half;
  double a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply& own = *static_cast<const Multiply*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i / 2 % 2 ? g + 8 : g, column = 2 * t + i % 2 + (i < 4 ? 0 : 8);
      a[row][column] = double(number[own.a[i / 2] >> (16 * (i % 2)) & 0xffff]);
    }
    for (int i = 0; i < 4; ++i) {
      b[g][2 * t + i % 2 + (i < 2 ? 0 : 8)] = double(number[own.b[i / 2] >> (16 * (i % 2)) & 0xffff]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply& own = *static_cast<const Multiply*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      double sum = double(own.c[i]);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      own.c[i] = float(sum);
    }
  }
}

struct Matrices {
  uint32_t address;
  uint32_t* d;
};

void load_all(void** lanes, int count) {
  const int first = self().id / 32 * 32;
  for (int matrix = 0; matrix < count; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      uint32_t words[4];
      const int owner = 8 * matrix + row;
      const uint32_t address = static_cast<const Matrices*>(lanes[owner])->address;
      read_shared(address, words, 16, block().threads[size_t(first + owner)]);
      for (int i = 0; i < 4; ++i) static_cast<const Matrices*>(lanes[4 * row + i])->d[matrix] = words[i];
    }
  }
}

struct Shuffle { uint32_t value, result; int from; };

uint32_t shuffle_from(const char* name, uint32_t value, int from) {
  Shuffle own = {value, 0, from};
  meet_warp(name, &own, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Shuffle& to = *static_cast<Shuffle*>(lanes[i]);
      to.result = static_cast<const Shuffle*>(lanes[to.from & 31])->value;
    }
  });
  return own.result;
}

}  // namespace

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat) {
  Multiply own = {c, a, b};
  meet_warp(bfloat ? "multiply_add of bf16" : "multiply_add of fp16", &own,
            [bfloat](void** lanes) { multiply_all(lanes, bfloat); });
}

void load_matrices(uint32_t address, uint32_t* d, int count) {
  Matrices own = {address, d};
  meet_warp(count == 4 ? "load_matrices_4" : "load_matrices_2", &own,
            [count](void** lanes) { load_all(lanes, count); });
}

}  // namespace emulator

uint32_t shuffle(uint32_t value, int lane) { return emulator::shuffle_from("shuffle", value, lane); }
uint32_t shuffle_xor(uint32_t value, int mask) {
  return emulator::shuffle_from("shuffle_xor", value, emulator::self().id % 32 ^ mask);
}

// What any lane did before happens before what any lane does behind it.
void warp_barrier() {
  using namespace emulator;
  meet_warp("warp_barrier", &self(), [](void** lanes) {
    std::vector<uint32_t> times(block().threads.size());
    for (int i = 0; i < 32; ++i) {
      Thread& thread = *static_cast<Thread*>(lanes[i]);
      thread.seen.resize(times.size());
      thread.seen[size_t(thread.id)] = thread.clock++;
      for (size_t j = 0; j < times.size(); ++j) times[j] = std::max(times[j], thread.seen[j]);
    }
    for (int i = 0; i < 32; ++i) static_cast<Thread*>(lanes[i])->seen = times;
  });
}

void thread_fence() { emulator::self().unfenced = false; }

// An atomic publishes the writes of its block if all threads that wrote have fenced since; and it shows what those
// published who changed the counter before.
uint32_t atomic_increment(uint32_t* counter) {
  using namespace emulator;
  uint32_t before;
  read_global(counter, &before, 4);
  std::vector<uint32_t>& all = block().globals->atomics[reinterpret_cast<uintptr_t>(counter)];
  all.resize(block().published.size());
  bool fenced = true;
  for (const Thread& thread : block().threads) fenced = fenced && !thread.unfenced;
  if (fenced) block().published[size_t(block().number)] = block().sequence;
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = block().published[i] = std::max(all[i], block().published[i]);
  }
  *counter = before + 1;
  return before;
}

}  // namespace qcompile::cuda
