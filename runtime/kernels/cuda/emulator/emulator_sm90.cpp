// mbarriers, bulk copies and barriers of warpgroups as the PTX ISA describes them. wgmma is in emulator_wgmma.cpp.

#include "emulator_sm90.h"

#include <algorithm>

#include "../device_sm90.h"
#include "emulator_wgmma.h"

namespace qcompile::cuda::sm90 {

using namespace emulator;

Fault planted = Fault::kNone;

namespace {

// An mbarrier. A phase ends when no arrival and no byte is pending; the next one begins at once.
struct Barrier {
  int64_t count = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;                     // phases that have ended
  bool fenced = false;                    // the copy engine sees it
  std::vector<uint32_t> arriving, ended;  // what happened before arrivals so far, and before the end of the last phase
};
std::map<uint32_t, Barrier> barriers;     // of the block that runs, by address; a block initializes its own first

Barrier& find(uint32_t address) {
  shared_bytes(address, 8, 8, self());
  note_read(address, 8, self());          // fails where this block has not initialized it, or without a barrier since
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("uses shared address " + hex(address) + " as a barrier, which it is not");
  return found->second;
}

void end_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.ended = barrier.arriving;
  ++barrier.phase;
}

void arrive(Barrier& barrier, uint32_t address) {
  if (barrier.pending == 0) fail("arrives at barrier " + hex(address) + ", where all have arrived");
  release(barrier.arriving);
  --barrier.pending;
  end_phase(barrier);
}

// Bytes are on their way: nobody may have them in use, and nobody may use them. Returns the time of this write.
uint32_t begin_copy(uint32_t shared, uint32_t bytes, const Barrier& barrier, uint32_t address) {
  if (!barrier.fenced) fail("copies to barrier " + hex(address) + ", whose initialization has not been fenced");
  shared_bytes(shared, bytes, 16, self());
  note_write(shared, bytes, self(), true);
  return self().clock++;
}

void land(uint32_t shared, uint32_t bytes, const uint8_t* data, uint32_t address, int thread, uint32_t time) {
  std::memcpy(block().shared.data() + (shared - kSharedBase), data, bytes);
  for (uint32_t at = shared; at < shared + bytes; at += 4) block().words[(at - kSharedBase) / 4].in_flight = false;
  Barrier& barrier = barriers[address];
  barrier.arriving.resize(block().threads.size());
  barrier.arriving[size_t(thread)] = std::max(barrier.arriving[size_t(thread)], time);
  barrier.bytes -= bytes;
  end_phase(barrier);
}

}  // namespace

void run(const Launch& launch, Globals& globals, const std::function<void()>& kernel, Fault fault) {
  planted = fault;
  barriers.clear();
  emulator::run(launch, globals, [&kernel] {
    wgmma_begin();
    kernel();
    wgmma_end();
  });
}

void barrier_init(uint32_t address, uint32_t count) {
  const uint64_t opaque = 0x6d62617272696572;
  write_shared(address, &opaque, 8, self());
  Barrier barrier;
  barrier.count = barrier.pending = count;
  barriers[address] = barrier;
}

void barrier_init_fence() {
  for (auto& entry : barriers) entry.second.fenced = true;
}

void barrier_arrive(uint32_t address) { arrive(find(address), address); }

void barrier_arrive_expect(uint32_t address, uint32_t bytes) {
  Barrier& barrier = find(address);
  barrier.bytes += planted == Fault::kFewerBytes ? bytes - 16 : bytes;
  arrive(barrier, address);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  const Barrier& barrier = find(address);
  if (planted == (self().id == 0 ? Fault::kNoEmptyWait : Fault::kNoFullWait)) return;
  if (planted == Fault::kWrongParity) parity ^= 1;
  wait_until("barrier_wait", [&barrier, parity] { return barrier.phase % 2 != parity; });
  acquire(barrier.ended);
}

void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t address) {
  const Barrier& barrier = find(address);
  if (bytes % 16) fail("copies " + std::to_string(bytes) + " bytes, not a multiple of 16");
  check_global(global, bytes);
  const uint32_t time = begin_copy(shared, bytes, barrier, address);
  const int thread = self().id;
  defer([=] { land(shared, bytes, static_cast<const uint8_t*>(global), address, thread, time); });
}

// Rows of a box lie 128 bytes apart. 128-byte swizzle: of the address of each 16 bytes, bits 4 to 6 are combined with
// bits 7 to 9 by exclusive or.
void copy_tile(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t address) {
  const Barrier& barrier = find(address);
  const TensorMap m = *map;
  if (m.box_columns * 2 > 128 || m.box_rows > 256 || m.stride % 16) fail("copies by a tensor map that cannot be");
  if (shared % 128) fail("copies a tile to " + hex(shared) + ", not aligned to 128 bytes");
  const uint32_t bytes = uint32_t(m.box_columns * m.box_rows * 2);
  std::vector<uint8_t> box(bytes);  // zeros outside of the tensor
  const int64_t columns = std::min<int64_t>(m.box_columns, m.columns - column);
  for (int r = 0; r < m.box_rows && row + r < m.rows && columns > 0; ++r) {
    const uint8_t* from = static_cast<const uint8_t*>(m.base) + (row + r) * m.stride + column * 2;
    check_global(from, uint32_t(columns * 2));
    for (int64_t i = 0; i < columns * 2; ++i) {
      const uint32_t at = shared + uint32_t(r * m.box_columns * 2 + i);
      box[(at ^ (at >> 7 & 7) << 4) - shared] = from[i];
    }
  }
  const uint32_t time = begin_copy(shared, bytes, barrier, address);
  const int thread = self().id;
  defer([=] { land(shared, bytes, box.data(), address, thread, time); });
}

void warpgroup_meets(const char* name) { meet(name, self().id / 128 * 128, 128, nullptr, [](void**) {}); }

void threads_barrier(int id, int first, int count) {
  if (planted == Fault::kNoThreadsBarrier) return;
  static const char* names[] = {"barrier 0", "barrier 1", "barrier 2", "barrier 3"};
  if (id < 1 || id > 3) fail("meets at a barrier that the emulator has not");
  meet(names[id], first, count, &self(), [count](void** all) {
    std::vector<uint32_t> times(block().threads.size());
    for (int i = 0; i < count; ++i) {
      Thread& thread = *static_cast<Thread*>(all[i]);
      thread.seen.resize(times.size());
      thread.seen[size_t(thread.id)] = thread.clock++;
      for (size_t j = 0; j < times.size(); ++j) times[j] = std::max(times[j], thread.seen[j]);
    }
    for (int i = 0; i < count; ++i) static_cast<Thread*>(all[i])->seen = times;
  });
}

}  // namespace qcompile::cuda::sm90
