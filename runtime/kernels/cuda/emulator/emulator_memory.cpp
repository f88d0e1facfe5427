// Shared and global memory as the emulator checks it, and asynchronous copies.

#include <cstdio>

#include "../device.h"

namespace qcompile::cuda::emulator {

namespace {

// Whether an access of another thread at `clock` in this interval came before what `thread` does now.
bool ordered(int other, uint32_t clock, const Thread& thread) {
  return other == thread.id || (size_t(other) < thread.seen.size() && thread.seen[size_t(other)] >= clock);
}

[[noreturn]] void race(const char* does, uint32_t address, int other, const char* did, const Thread& thread) {
  fail(std::string(does) + " shared word " + hex(address) + " (byte " + std::to_string(address - kSharedBase) +
           "), which thread " + std::to_string(other) + " " + did + " with no barrier in between", &thread);
}

Word& word_at(uint32_t address) { return block().words[(address - kSharedBase) / 4]; }

void check_writer(const char* does, const Word& word, uint32_t address, const Thread& thread) {
  const bool here = word.writer >= 0 && word.write_interval == block().interval;
  if (here && !ordered(word.writer, word.write_clock, thread)) race(does, address, word.writer, "wrote", thread);
}

Globals::Range* global_range(const void* data, uint32_t bytes, uint32_t align, const char* does) {
  char text[160];
  if (reinterpret_cast<uintptr_t>(data) % align) {
    std::snprintf(text, sizeof text, "%s %u bytes of global memory at %p, not aligned to %u", does, bytes, data, align);
    fail(text);
  }
  Globals::Range* range = block().globals->find(data, bytes);
  if (!range) {
    std::snprintf(text, sizeof text, "%s %u bytes of global memory at %p, out of bounds", does, bytes, data);
    fail(text);
  }
  return range;
}

void check_published(const Globals::Range& range, uintptr_t begin, uint32_t bytes) {
  if (range.written.empty()) return;
  for (uintptr_t i = (begin - range.begin) / 2; i < (begin - range.begin + bytes + 1) / 2; ++i) {
    const Globals::Written& written = range.written[i];
    if (written.block < 0 || written.block == block().number) continue;
    if (block().published[size_t(written.block)] < written.sequence) {
      fail("reads " + range.name + " as block " + std::to_string(written.block) +
           " wrote it, without a fence and an atomic that order them");
    }
  }
}

}  // namespace

Globals::Range* Globals::find(const void* data, size_t bytes) {
  for (Range& range : ranges_) {
    const uintptr_t begin = address(data);
    if (begin >= range.begin && begin + bytes <= range.begin + range.bytes) return &range;
  }
  return nullptr;
}

void Globals::forget() {
  for (Range& range : ranges_) range.written.assign(range.written.size(), Written());
  atomics.clear();
}

uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t align, const Thread& thread) {
  if (address % align) {
    fail("shared address " + hex(address) + " is not aligned to " + std::to_string(align) + " bytes", &thread);
  }
  if (address < kSharedBase || address + bytes > kSharedBase + block().shared.size()) {
    fail("shared address " + hex(address) + " is out of bounds: byte " + std::to_string(int(address - kSharedBase)) +
             ", there are " + std::to_string(block().shared.size()), &thread);
  }
  return block().shared.data() + (address - kSharedBase);
}

void note_read(uint32_t address, uint32_t bytes, Thread& thread) {
  for (uint32_t at = address; at < address + bytes; at += 4) {
    Word& word = word_at(at);
    if (word.in_flight) {
      fail("reads shared word " + hex(at) + " before the asynchronous copy of thread " + std::to_string(word.writer) +
               " to it has been waited for", &thread);
    }
    if (word.writer < 0) fail("reads shared word " + hex(at) + ", which nothing has written", &thread);
    check_writer("reads", word, at, thread);
    if (word.read_interval != block().interval) word.readers.clear();
    word.read_interval = block().interval;
    bool known = false;
    for (Access& reader : word.readers) {
      if (reader.thread == thread.id) reader.clock = thread.clock, known = true;
    }
    if (!known) word.readers.push_back({thread.id, thread.clock});
  }
}

void note_write(uint32_t address, uint32_t bytes, Thread& thread, bool in_flight) {
  for (uint32_t at = address; at < address + bytes; at += 4) {
    Word& word = word_at(at);
    if (word.in_flight) {
      fail("writes shared word " + hex(at) + " while an asynchronous copy of thread " + std::to_string(word.writer) +
               " to it is on its way", &thread);
    }
    check_writer("writes", word, at, thread);
    if (word.read_interval == block().interval) {
      for (const Access& reader : word.readers) {
        if (!ordered(reader.thread, reader.clock, thread)) race("writes", at, reader.thread, "read", thread);
      }
    }
    word.readers.clear();
    word.writer = thread.id;
    word.write_interval = block().interval;
    word.write_clock = thread.clock;
    word.in_flight = in_flight;
  }
  if (in_flight) std::memset(shared_bytes(address, bytes, 4, thread), kPoison, bytes);
}

void read_shared(uint32_t address, void* out, uint32_t bytes, Thread& thread) {
  const uint8_t* from = shared_bytes(address, bytes, bytes, thread);
  note_read(address, bytes, thread);
  std::memcpy(out, from, bytes);
}

void write_shared(uint32_t address, const void* in, uint32_t bytes, Thread& thread) {
  uint8_t* to = shared_bytes(address, bytes, bytes, thread);
  note_write(address, bytes, thread);
  std::memcpy(to, in, bytes);
}

void read_global(const void* from, void* out, uint32_t bytes) {
  const Globals::Range* range = global_range(from, bytes, bytes, "reads");
  check_published(*range, reinterpret_cast<uintptr_t>(from), bytes);
  std::memcpy(out, from, bytes);
}

void write_global(void* to, const void* in, uint32_t bytes) {
  Globals::Range* range = global_range(to, bytes, bytes, "writes");
  if (range->written.empty()) fail("writes to " + range->name + ", which the kernel may only read");
  const uintptr_t first = reinterpret_cast<uintptr_t>(to) - range->begin;
  ++block().sequence;
  for (uintptr_t i = first / 2; i < (first + bytes + 1) / 2; ++i) {
    Globals::Written& written = range->written[i];
    const bool other = written.block >= 0 && written.block != block().number;
    if (other && block().published[size_t(written.block)] < written.sequence) {
      fail("writes to " + range->name + " what block " + std::to_string(written.block) + " wrote, too");
    }
    written = {block().number, block().sequence};
  }
  self().unfenced = true;
  std::memcpy(to, in, bytes);
}

void check_global(const void* from, uint32_t bytes) {
  check_published(*global_range(from, bytes, 16, "copies"), reinterpret_cast<uintptr_t>(from), bytes);
}

// The copy lands when it is waited for, never earlier.
void copy_async(uint32_t to, const void* from, uint32_t bytes) {
  if (bytes) check_global(from, bytes);
  shared_bytes(to, 16, 16, self());
  note_write(to, 16, self(), true);
  self().copies.push_back({to, from, bytes});
  ++self().uncommitted;
}

void copy_async_wait(size_t pending) {
  Thread& thread = self();
  while (thread.groups.size() > pending) {
    for (size_t i = 0; i < thread.groups.front(); ++i) {
      const Copy& copy = thread.copies[i];
      for (uint32_t at = copy.to; at < copy.to + 16; at += 4) word_at(at).in_flight = false;
      note_write(copy.to, 16, thread);
      uint8_t* to = shared_bytes(copy.to, 16, 16, thread);
      std::memset(to, 0, 16);
      if (copy.bytes) std::memcpy(to, copy.from, copy.bytes);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(thread.groups.front()));
    thread.groups.erase(thread.groups.begin());
  }
}

}  // namespace qcompile::cuda::emulator
