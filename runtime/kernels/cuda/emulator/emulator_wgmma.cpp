// wgmma as the PTX ISA describes it: fragments, matrix descriptors, groups that are done when they are waited for.

#include "emulator_wgmma.h"

#include <cmath>
#include <map>

#include "../device_sm90.h"

namespace qcompile::cuda::sm90 {

using namespace emulator;

namespace {

struct Operation {
  float* d;
  const uint32_t* a;
  uint32_t issued[4];  // a, when it was issued
  uint64_t descriptor;
  int tokens;
  bool half;
};

// Of a thread. Accumulators are kept here, and NaN in the thread, until nothing under way writes them.
struct Queue {
  bool fenced = false;
  std::vector<Operation> open;
  std::vector<std::vector<Operation>> groups;
  std::map<float*, std::pair<std::vector<float>, int>> accumulators;  // values, operations under way
};
std::vector<Queue> queues(1024);

Queue& queue_of(int thread) { return queues[size_t(thread)]; }

const std::vector<float>& numbers(bool half) {
  static const auto make = [](bool of_half) {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < 65536; ++i) values[i] = of_half ? half_number(uint16_t(i)) : bfloat_number(uint16_t(i));
    return values;
  };
  static const std::vector<float> halves = make(true), bfloats = make(false);
  return half ? halves : bfloats;
}

// Matrix descriptor: bits 0-13 address, 16-29 leading and 32-45 stride byte offset, all in 16 bytes; 49-51 base offset;
// 62-63 swizzle: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32.
struct Descriptor {
  uint32_t address, leading, stride, base, swizzle;
  explicit Descriptor(uint64_t bits)
      : address(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4), base(uint32_t(bits >> 49 & 7)), swizzle(uint32_t(bits >> 62)) {}

  // Where elements 8 piece … 8 piece + 7 along k of a row lie (K-major canonical layouts; a row is a token). Swizzled,
  // rows are as long as the swizzle and the bits of their number are combined with those of the piece.
  uint32_t piece(int row, int piece) const {
    const uint32_t r = uint32_t(row), p = uint32_t(piece);
    if (swizzle == 0) return address + r / 8 * stride + p * leading + r % 8 * 16;
    const uint32_t at = address + r / 8 * stride + r % 8 * (256u >> swizzle) + p * 16;
    const uint32_t bits = (8u >> (swizzle - 1)) - 1;
    return at ^ (at >> 7 & bits) << 4;
  }
};

uint64_t faulty(uint64_t bits) {
  if (planted == Fault::kWrongStride) return (bits & ~(uint64_t(0x3fff) << 32)) | uint64_t(512 / 16) << 32;
  if (planted == Fault::kNoSwizzle) return bits & ~(uint64_t(3) << 62);
  return planted == Fault::kWrongAddress ? bits & ~uint64_t(0x3f) : bits;
}

// The tile as the tensor cores of this warp read it, for its first lane: ordered behind its copy, before its next one.
void note_tile(const Operation& operation, Thread& thread) {
  const Descriptor descriptor(operation.descriptor);
  if (descriptor.base) fail("multiplies by a descriptor with a base offset, which is for tiles at odd addresses");
  for (int row = 0; row < operation.tokens; ++row) {
    for (int piece = 0; piece < 2; ++piece) {
      const uint32_t at = descriptor.piece(row, piece);
      shared_bytes(at, 16, 16, thread);
      note_read(at, 16, thread);
    }
  }
}

// Rows of the warp: d (16, tokens) += a (16, 16) b (16, tokens), with the fragments of m64nNk16 of its 32 lanes. a: as
// in mma.m16n8k16. d[4 j + i]: column 8 j + 2 (lane % 4) + i % 2 of row lane / 4, the latter plus 8 from i = 2 on.
void multiply(const Operation* const* lanes) {
  const Operation& first = *lanes[0];
  const std::vector<float>& number = numbers(first.half);
  const Descriptor descriptor(first.descriptor);
  static float a[16][16], b[16][256], d[16][256];
  for (int row = 0; row < first.tokens; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      const uint32_t at = descriptor.piece(row, k / 8) + uint32_t(k % 8) * 2;
      std::memcpy(&bits, block().shared.data() + (at - kSharedBase), 2);
      b[k][row] = number[bits];
    }
  }
  const int first_thread = self().id / 32 * 32;
  const auto each = [&first](int lane, int i, auto&& use) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (i < first.tokens / 2) use(d[lane / 4 + i / 2 % 2 * 8][column]);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const std::vector<float>& own = queue_of(first_thread + lane).accumulators[lanes[lane]->d].first;
    for (int i = 0; i < first.tokens / 2; ++i) each(lane, i, [&](float& value) { value = own[size_t(i)]; });
    for (int e = 0; e < 8; ++e) {
      a[element_row(lane, e)][element_k(lane, e)] = number[lanes[lane]->a[e / 2] >> (16 * (e % 2)) & 0xffff];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < first.tokens; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    std::vector<float>& own = queue_of(first_thread + lane).accumulators[lanes[lane]->d].first;
    for (int i = 0; i < first.tokens / 2; ++i) each(lane, i, [&](float& value) { own[size_t(i)] = value; });
  }
}

// The oldest group of each of the 32 threads from `first` on.
void finish_group(int first) {
  const size_t count = queue_of(first).groups.front().size();
  for (size_t i = 0; i < count; ++i) {
    const Operation* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      const Operation& operation = queue_of(first + lane).groups.front()[i];
      lanes[lane] = &operation;
      if (std::memcmp(operation.a, operation.issued, sizeof operation.issued) != 0) {
        fail("has changed the A registers of a wgmma that was not waited for", &block().threads[size_t(first + lane)]);
      }
    }
    note_tile(*lanes[0], block().threads[size_t(first)]);
    multiply(lanes);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Queue& queue = queue_of(first + lane);
    for (const Operation& operation : queue.groups.front()) {
      auto& accumulator = queue.accumulators[operation.d];
      if (--accumulator.second > 0) continue;
      std::memcpy(operation.d, accumulator.first.data(), accumulator.first.size() * 4);
      queue.accumulators.erase(operation.d);
    }
    queue.groups.erase(queue.groups.begin());
  }
}

}  // namespace

void wgmma_begin() { queue_of(self().id) = Queue(); }

void wgmma_end() {
  const Queue& queue = queue_of(self().id);
  if (!queue.open.empty() || !queue.groups.empty()) fail("exits with wgmma that nothing waits for");
}

void wgmma_fence() {
  if (planted != Fault::kNoWgmmaFence) queue_of(self().id).fenced = true;
}

void wgmma_issue(float* d, const uint32_t* a, uint64_t descriptor, int tokens, bool half) {
  Queue& queue = queue_of(self().id);
  if (!queue.fenced) fail("multiplies with no wgmma_fence since its registers may have changed");
  Operation operation{d, a, {}, faulty(descriptor), tokens, half};
  std::memcpy(operation.issued, a, sizeof operation.issued);
  auto& accumulator = queue.accumulators[d];
  if (accumulator.second++ == 0) {
    accumulator.first.assign(d, d + tokens / 2);
    for (int i = 0; i < tokens / 2; ++i) d[i] = NAN;
  }
  queue.open.push_back(operation);
  meet_warp("wgmma", &operation, [](void** lanes) {
    const Operation& first = *static_cast<const Operation*>(lanes[0]);
    for (int i = 1; i < 32; ++i) {
      const Operation& other = *static_cast<const Operation*>(lanes[i]);
      if (other.descriptor != first.descriptor) fail("lanes of a warp give wgmma different descriptors");
    }
    note_tile(first, block().threads[size_t(self().id / 32 * 32)]);
  });
}

void wgmma_commit() {
  Queue& queue = queue_of(self().id);
  queue.groups.push_back(queue.open);
  queue.open.clear();
  queue.fenced = false;
}

void wgmma_wait_pending(int pending) {
  if (planted == (pending ? Fault::kNoWgmmaWait : Fault::kNoFinalWait)) return;
  int own = pending;
  meet_warp("wgmma_wait", &own, [](void** lanes) {
    const int first = self().id / 32 * 32;
    while (queue_of(first).groups.size() > size_t(*static_cast<const int*>(lanes[0]))) finish_group(first);
  });
}

}  // namespace qcompile::cuda::sm90
