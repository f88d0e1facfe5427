#include "ceilings.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxThreads = 256;
constexpr int64_t kAhead = 4096;     // bytes of prefetch, of all streams together
constexpr int64_t kStep = 256;       // bytes of one step of reading
constexpr int64_t kRounds = 1 << 14; // steps of a dot product between two looks at the clock: about 50 µs

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Results end here, where no compiler can leave them out.
std::atomic<uint64_t> sink;

// ---- reading: the exclusive or of kStreams pieces of `piece` bytes each, a multiple of kStep, one behind the other ----

template <int kStreams>
uint64_t read_plain(const uint8_t* data, int64_t piece) {
  uint64_t sum[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < piece; i += 32) {
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int j = 0; j < 4; ++j) {
        uint64_t word;
        std::memcpy(&word, data + stream * piece + i + 8 * j, 8);
        sum[j] ^= word;
      }
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline uint64_t first_word(__m512i sum) {
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, sum);
  return words[0];
}

template <int kStreams>
__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* data, int64_t piece) {
  __m256i sum[8] = {};
  for (int64_t i = 0; i < piece; i += kStep) {
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int j = 0; j < 8; ++j) {
        const uint8_t* in = data + stream * piece + i + 32 * j;
        if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(in) + kAhead / kStreams, _MM_HINT_T0);
        sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
      }
    }
  }
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sum[0], 0));
}

template <int kStreams>
__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t* data, int64_t piece) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i < piece; i += kStep) {
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t* in = data + stream * piece + i + 64 * j;
        _mm_prefetch(reinterpret_cast<const char*>(in) + kAhead / kStreams, _MM_HINT_T0);
        sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(in));
      }
    }
  }
  for (int j = 1; j < 4; ++j) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
  return first_word(sum[0]);
}
#endif

using Read = uint64_t (*)(const uint8_t*, int64_t);

template <int kStreams>
Read widest_read() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512<kStreams>;
  if (__builtin_cpu_supports("avx2")) return read_avx2<kStreams>;
#endif
  return read_plain<kStreams>;
}

// ---- dot products: `rounds` steps of independent sums, enough of them to cover the instruction's latency ----
//
// In assembly, because a compiler takes products of the same operands out of the loop, or keeps the sums in memory.
// What the registers hold does not matter: integer instructions take as long for any values.

#if defined(__x86_64__)
#define SUMS "2,3,4,5,6,7,8,9,10,11,12,13"
#define CLOBBERS                                                                                                      \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
constexpr int kSums = 12;

inline void zero_upper() { __asm__ volatile("vzeroupper" ::: CLOBBERS); }

__attribute__((target("avx2"))) void dot_avx2(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(".irp sum," SUMS
                     "\n vpmaddubsw %%ymm1, %%ymm0, %%ymm14"
                     "\n vpmaddwd %%ymm15, %%ymm14, %%ymm14"
                     "\n vpaddd %%ymm14, %%ymm\\sum, %%ymm\\sum"
                     "\n .endr" ::
                         : CLOBBERS);
  }
  zero_upper();
}

__attribute__((target("avx2,avxvnni"))) void dot_avxvnni(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(".irp sum," SUMS "\n %{vex%} vpdpbusd %%ymm1, %%ymm0, %%ymm\\sum\n .endr" ::: CLOBBERS);
  }
  zero_upper();
}

__attribute__((target("avx2,avx512f,avx512vl,avx512vnni"))) void dot_avx512vl(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(".irp sum," SUMS "\n %{evex%} vpdpbusd %%ymm1, %%ymm0, %%ymm\\sum\n .endr" ::: CLOBBERS);
  }
  zero_upper();
}

__attribute__((target("avx512f,avx512vnni"))) void dot_avx512vnni(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(".irp sum," SUMS "\n vpdpbusd %%zmm1, %%zmm0, %%zmm\\sum\n .endr" ::: CLOBBERS);
  }
  zero_upper();
}

bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512vnni() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512vl() { return has_avx512vnni() && __builtin_cpu_supports("avx512vl"); }

#elif defined(__aarch64__)
constexpr int kSums = 16;

__attribute__((target("arch=armv8.2-a+dotprod"))) void dot_neon(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(".irp sum,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
                     "\n sdot v\\sum\\().4s, v0.16b, v1.16b"
                     "\n .endr" ::
                         : "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28",
                           "v29", "v30", "v31");
  }
}

bool has_neon() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1u << 20)) != 0;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple core
#endif
}
#endif

struct Dot {
  const char* name;
  bool (*available)();
  void (*run)(int64_t rounds);
  int64_t products;  // of one instruction
};

const Dot kDots[] = {
#if defined(__x86_64__)
    {"avx2", has_avx2, dot_avx2, 32},
    {"avxvnni", has_avxvnni, dot_avxvnni, 32},
    {"avx512vl", has_avx512vl, dot_avx512vl, 32},
    {"avx512vnni", has_avx512vnni, dot_avx512vnni, 64},
#elif defined(__aarch64__)
    {"neon", has_neon, dot_neon, 16},
#endif
    {nullptr, nullptr, nullptr, 0},
};

// ---- several threads that begin at once ----

// work(i) on thread i of `threads`, all begun together, the caller being one of them. False if no thread could be made.
template <typename Work>
bool together(int threads, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> abandoned{false};
  const auto body = [&](int index) {
    ready.fetch_add(1);
    while (ready.load() < threads && !abandoned.load()) {
    }
    if (!abandoned.load()) work(index);
  };
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<size_t>(threads));
    for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
  } catch (const std::exception&) {
    abandoned.store(true);
  }
  if (!abandoned.load()) body(0);
  for (std::thread& other : others) other.join();
  return !abandoned.load();
}

}  // namespace

double qcompile_read_seconds(const void* buffer, int64_t bytes, int threads, int streams) {
  if (!buffer || threads < 1 || threads > kMaxThreads || (streams != 1 && streams != 4)) return 0.0;
  const Read read = streams == 1 ? widest_read<1>() : widest_read<4>();
  const int64_t piece = bytes / threads / streams / kStep * kStep, part = piece * streams;
  if (piece < 1) return 0.0;
  std::vector<Clock::time_point> begun(static_cast<size_t>(threads)), ended(static_cast<size_t>(threads));
  const bool done = together(threads, [&](int index) {
    begun[static_cast<size_t>(index)] = Clock::now();
    sink.fetch_xor(read(static_cast<const uint8_t*>(buffer) + index * part, piece));
    ended[static_cast<size_t>(index)] = Clock::now();
  });
  if (!done) return 0.0;
  Clock::time_point first = begun[0], last = ended[0];
  for (const Clock::time_point& time : begun) first = time < first ? time : first;
  for (const Clock::time_point& time : ended) last = time > last ? time : last;
  const double seconds = std::chrono::duration<double>(last - first).count();
  return seconds * static_cast<double>(bytes) / static_cast<double>(part * threads);
}

const char* qcompile_dot_names() {
  static char names[64];
  static const bool filled = [] {
    for (const Dot* dot = kDots; dot->name; ++dot) {
      if (!dot->available()) continue;
      if (names[0]) std::strcat(names, ",");
      std::strcat(names, dot->name);
    }
    return true;
  }();
  (void)filled;
  return names;
}

double qcompile_dot_rate(const char* name, int threads, double seconds) {
  if (!name || threads < 1 || threads > kMaxThreads) return 0.0;
  for (const Dot* dot = kDots; dot->name; ++dot) {
    if (std::strcmp(dot->name, name) != 0 || !dot->available()) continue;
    std::vector<double> rates(static_cast<size_t>(threads), 0.0);
    const bool done = together(threads, [&](int index) {
      const Clock::time_point start = Clock::now();
      int64_t rounds = 0;
      double elapsed = 0.0;
      do {
        dot->run(kRounds);
        rounds += kRounds;
        elapsed = seconds_since(start);
      } while (elapsed < seconds);
      rates[static_cast<size_t>(index)] = static_cast<double>(2 * rounds * kSums * dot->products) / elapsed;
    });
    double total = 0.0;
    for (const double rate : rates) total += done ? rate : 0.0;
    return total;
  }
  return 0.0;
}
