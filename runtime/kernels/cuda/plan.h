// Which kernel computes a product, and how it is cut: pure arithmetic, tested without a GPU.
#pragma once

#include <cstdint>

#include "layout.h"

namespace qcompile::cuda {

// What a plan depends on of the device. architecture: 80, 86, 89, 90; newer ones count as 80 unless they are 90.
struct Machine {
  int multiprocessors;
  int architecture;
  int64_t shared_bytes;     // of one block, at most
  int64_t shared_total;     // of one multiprocessor
  double bytes_per_second;  // read bandwidth of its memory
  double half_per_second;   // dense fp16 multiply-adds, times two
};

enum class Route : int {
  kDecode,      // mma.sync, weights dequantized in registers
  kDequantize,  // chunks of the weight to fp16 or bf16, then cuBLAS
  kHopper,      // TMA and wgmma, sm_90a
};

// Rows of one launch at most: gridDim.z ends at 65535, and the smallest tiles have 8 rows. Longer products are cut.
constexpr int64_t kMaxRows = int64_t(1) << 18;

// What may be used: cuBLAS was found; kernels that have run on a GPU are told by their routes.
struct Available {
  bool cublas = false;
  bool hopper = false;
};

struct Plan {
  Route route;
  // kDecode and kHopper: a CTA computes block_n columns for `tokens` rows of x over `steps` of 64 k.
  int tokens;             // 8, 16, 32 or 64 (kDecode); 64, 128 or 256 (kHopper)
  int block_n;            // 64 or 128
  int stages;             // of the pipeline
  int threads;
  int split;              // CTAs that share a sum over k; each takes ceil(units / split) units
  int64_t grid_n, grid_m; // CTAs; gridDim is (grid_n, split, grid_m)
  int64_t shared_bytes;
  // kDequantize: columns of the weight dequantized at a time.
  int64_t chunk;
  int64_t scratch_bytes;  // partial sums or the chunk; without what `prepare` needs for x
  int64_t counters;       // of the CTAs that share a sum; 0 where split is 1
  double predicted_seconds;
};

// The plan of least predicted time for m rows of x (its first kMaxRows). `forced`: -1, or the Route that must be taken
// (tests, benchmarks). Throws std::runtime_error where that one is not possible, or no kernel fits the machine.
Plan make_plan(const Layout& layout, int64_t m, const Machine& machine, const Available& available, int forced = -1);

}  // namespace qcompile::cuda
