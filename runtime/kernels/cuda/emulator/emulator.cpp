// Fibers, their scheduler, and the points where threads meet.

#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another stack for a fault
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

namespace qcompile::cuda::emulator {

struct Fiber {
  ucontext_t first;  // how it starts; afterwards `place` is where it goes on
  jmp_buf place;
  bool started = false;
};

namespace {

constexpr size_t kStack = 256 << 10;

Block* running = nullptr;
Thread* current = nullptr;
const std::function<void()>* body = nullptr;
std::string failure;  // of the launch; the first one counts
jmp_buf scheduler;
ucontext_t scheduler_context;

// Stacks and contexts, kept for all launches.
std::vector<Fiber*> fibers;

Fiber* fiber(size_t i) {
  while (fibers.size() <= i) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    fibers.push_back(new Fiber);
    getcontext(&fibers.back()->first);
    fibers.back()->first.uc_stack.ss_sp = stack;
    fibers.back()->first.uc_stack.ss_size = kStack;
  }
  return fibers[i];
}

__attribute__((noinline)) void leave() {
  if (_setjmp(current->fiber->place) == 0) _longjmp(scheduler, 1);
}

// A thread from beginning to end. Errors end the launch: other threads stay where they are.
void run_thread() {
  try {
    (*body)();
    if (!current->copies.empty()) fail("exits with asynchronous copies that nothing waits for");
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  current->done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void enter(Thread& thread) {
  current = &thread;
  Fiber* fiber = thread.fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  makecontext(&fiber->first, run_thread, 0);
  swapcontext(&scheduler_context, &fiber->first);
}

int take(std::vector<int>& list) {
  const size_t i = random_below(uint32_t(list.size()));
  const int value = list[i];
  list[i] = list.back();
  list.pop_back();
  return value;
}

// Makes threads ready whose condition has come true.
bool poll(Block& block) {
  bool any = false;
  for (size_t i = block.polled.size(); i-- > 0;) {
    if (!(*block.polled[i].second)()) continue;
    block.ready.push_back(block.polled[i].first);
    block.polled.erase(block.polled.begin() + long(i));
    any = true;
  }
  return any;
}

void run_deferred(Block& block) {
  const size_t i = random_below(uint32_t(block.deferred.size()));
  const std::function<void()> work = block.deferred[i];
  block.deferred.erase(block.deferred.begin() + long(i));
  try {
    work();
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
}

std::string deadlock(const Block& block) {
  std::map<std::string, std::pair<int, int>> waiting;  // by what they wait for: how many, and the first
  for (const Thread& thread : block.threads) {
    auto& entry = waiting[thread.done ? "(exited)" : thread.waits_for];
    if (entry.first++ == 0) entry.second = thread.id;
  }
  std::string text = "threads wait for ever, each for others that do not come:";
  for (const auto& entry : waiting) {
    text += " " + std::to_string(entry.second.first) + " at " + entry.first + " (thread " +
            std::to_string(entry.second.second) + ")";
  }
  return text;
}

void run_block(Block& block) {
  for (Thread& thread : block.threads) block.ready.push_back(thread.id);
  while (failure.empty()) {
    // Conditions and asynchronous engines are looked at now and then, so that they come early and late.
    if (!block.polled.empty() && random_below(8) == 0) poll(block);
    if (!block.deferred.empty() && random_below(16) == 0) run_deferred(block);
    if (!block.ready.empty()) {
      enter(block.threads[size_t(take(block.ready))]);
    } else if (!block.polled.empty() && poll(block)) {
      continue;
    } else if (!block.deferred.empty()) {
      run_deferred(block);
    } else {
      break;
    }
  }
  for (const Thread& thread : block.threads) {
    current = &block.threads[0];
    if (failure.empty() && !thread.done) failure = "block " + std::to_string(block.number) + ": " + deadlock(block);
  }
}

void start_block(Block& block, int number) {
  const Launch& launch = block.launch;
  block.number = number;
  const int row = number / launch.grid.x;
  block.index = {number % launch.grid.x, row % launch.grid.y, row / launch.grid.y};
  ++block.interval;
  std::memset(block.shared.data(), kPoison, block.shared.size());
  for (Word& word : block.words) word.writer = -1, word.in_flight = false, word.readers.clear();
  block.threads.assign(size_t(launch.threads), Thread());
  for (int i = 0; i < launch.threads; ++i) {
    block.threads[size_t(i)].id = i;
    block.threads[size_t(i)].fiber = fiber(size_t(i));
    block.threads[size_t(i)].fiber->started = false;
  }
  block.rendezvous.clear();
  block.deferred.clear();
  block.ready.clear();
  block.polled.clear();
  block.sequence = 0;
}

}  // namespace

Block& block() { return *running; }
Thread& self() { return *current; }

uint32_t random_below(uint32_t n) {
  uint64_t& state = running->random;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return uint32_t(state >> 32) % n;
}

std::string hex(uint32_t address) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", address);
  return text;
}

void fail(const std::string& what, const Thread* thread) {
  const int id = (thread ? thread : current)->id;
  char where[100];
  std::snprintf(where, sizeof where, "block (%d, %d, %d) thread %d (warp %d, lane %d): ", running->index.x,
                running->index.y, running->index.z, id, id / 32, id % 32);
  throw Error(where + what);
}

void meet(const char* name, int first, int count, void* argument, const std::function<void(void**)>& all) {
  Rendezvous& place = running->rendezvous[{first, count}];
  if (place.arrived == 0) {
    place.name = name;
    place.arguments.resize(size_t(count));
  } else if (place.name != name) {
    fail(std::string("is at ") + name + " while others of its group are at " + place.name);
  }
  place.arguments[size_t(current->id - first)] = argument;
  if (++place.arrived < count) {
    current->waits_for = name;
    leave();
    return;
  }
  place.arrived = 0;
  all(place.arguments.data());
  for (int i = first; i < first + count; ++i) {
    if (i != current->id) running->ready.push_back(i);
  }
}

void wait_until(const char* name, const std::function<bool()>& ready) {
  if (ready()) return;
  current->waits_for = name;
  running->polled.push_back({current->id, &ready});
  leave();
}

void defer(std::function<void()> work) { running->deferred.push_back(std::move(work)); }

void release(std::vector<uint32_t>& to) {
  to.resize(running->threads.size());
  current->seen.resize(to.size());
  current->seen[size_t(current->id)] = current->clock++;
  for (size_t i = 0; i < to.size(); ++i) to[i] = to[i] > current->seen[i] ? to[i] : current->seen[i];
}

void acquire(const std::vector<uint32_t>& from) {
  current->seen.resize(running->threads.size());
  for (size_t i = 0; i < from.size(); ++i) {
    current->seen[i] = from[i] > current->seen[i] ? from[i] : current->seen[i];
  }
}

void run(const Launch& launch, Globals& globals, const std::function<void()>& kernel) {
  Block block;
  block.launch = launch;
  block.globals = &globals;
  block.random = launch.seed * 0x9e3779b97f4a7c15u + 1;
  block.shared.resize(size_t(launch.shared_bytes));
  block.words.resize(size_t(launch.shared_bytes + 3) / 4);
  globals.forget();
  running = &block;
  body = &kernel;
  failure.clear();
  std::vector<int> order;
  for (int i = 0; i < launch.grid.x * launch.grid.y * launch.grid.z; ++i) order.push_back(i);
  while (!order.empty() && failure.empty()) {
    start_block(block, take(order));
    block.published.assign(size_t(launch.grid.x * launch.grid.y * launch.grid.z), 0);
    run_block(block);
  }
  running = nullptr;
  current = nullptr;
  if (!failure.empty()) throw Error(failure);
}

}  // namespace qcompile::cuda::emulator
