#include "weight_memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QCOMPILE_OWN_MEMORY
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || !defined(MADV_HUGEPAGE)
#define QCOMPILE_OWN_MEMORY
#endif

namespace qcompile {
namespace {

constexpr size_t kPage = 4096;

size_t rounded(size_t bytes, size_t unit) {
  if (bytes > SIZE_MAX - 2 * unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

#ifdef QCOMPILE_OWN_MEMORY

std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kPage, rounded(bytes, kPage)) != 0) throw std::bad_alloc();
  return {static_cast<uint8_t*>(memory), std::free};
}

#else

namespace {

constexpr size_t kHugePage = size_t{1} << 21;
// Addresses, not memory: what no weight has touched is nowhere.
constexpr size_t kSlab = size_t{64} << 20;

class Slab {
 public:
  explicit Slab(size_t bytes) : mapped_(rounded(bytes, kHugePage) + kHugePage) {
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    next_ = rounded(reinterpret_cast<uintptr_t>(memory_), kHugePage);
    end_ = next_ + mapped_ - kHugePage;
    madvise(reinterpret_cast<void*>(next_), end_ - next_, MADV_HUGEPAGE);  // where it fails, pages are ordinary ones
  }
  ~Slab() { munmap(memory_, mapped_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // nullptr where too little is left.
  uint8_t* take(size_t bytes) {
    if (bytes > end_ - next_) return nullptr;
    const uintptr_t taken = next_;
    next_ += bytes;
    return reinterpret_cast<uint8_t*>(taken);
  }

 private:
  size_t mapped_;
  void* memory_;
  uintptr_t next_, end_;
};

}  // namespace

std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Slab> newest;
  const size_t size = rounded(bytes, kPage);
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Slab> slab = newest.lock();
  uint8_t* taken = slab ? slab->take(size) : nullptr;
  if (!taken) {
    slab = std::make_shared<Slab>(std::max(size, kSlab));
    newest = slab;
    taken = slab->take(size);
  }
  return {slab, taken};
}

#endif

}  // namespace qcompile
