#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "decode_shape.h"
#include "hopper_limits.h"

namespace qcompile::cuda {
namespace {

// ---- How kDecode (decode_shape.h) and kHopper (hopper_limits.h) are cut

constexpr int kMinUnits = 3;         // of a CTA: fewer do not fill its pipeline
constexpr int64_t kMaxK = int64_t(1) << 21;          // padded; as far as decode.h's division by the group is exact
constexpr int64_t kMaxN = (int64_t(1) << 31) - 128;  // padded; its columns are ints
constexpr int kMaxSplit = 16;        // partial sums are read back one after another
constexpr int kMinSteps = 12;        // of 64 k, of a CTA of kHopper: its pipeline has 5 to 12 stages
constexpr int kMaxCtas = 4;          // of a multiprocessor, where sums are split: more CTAs do not read faster
constexpr int64_t kReserved = 1024;  // bytes of shared memory that a resident CTA costs beside its own

struct Tile {
  int tokens;
  int stages;    // at most; a fourth one of the large tiles would fit H100 alone
  int resident;  // CTAs a multiprocessor, by the registers of a thread
};
constexpr Tile kTilesOfDecode[] = {{8, 4, 4}, {16, 4, 4}, {32, 3, 1}, {64, 3, 1}};

// ---- What things cost. From data sheets and from kernels of others; none of it was measured with these kernels.

constexpr double kBandwidth = 0.85;     // of a memory's nominal rate: what plain copies reach
constexpr double kCacheRatio = 2.0;     // rate of the second-level cache, times that of memory
constexpr double kLatency = 800e-9;     // seconds until a load from memory under load is there
constexpr double kBurst = 2.0;          // loads come in bursts between barriers: bytes in flight, times Little's law
constexpr double kSmShare = 2.0;        // what one multiprocessor can read, times its share of the bandwidth
constexpr double kMmaSync = 0.55;       // of the fp16 rate; 0.75 is the best that is known of mma.sync on Hopper
constexpr double kConversion = 16;      // instructions of a warp for 256 weights: 9 to 13 to convert, loads, scales
constexpr double kPerEight = 1.5;       // and for 8 tokens: one mma, half an ldmatrix
constexpr double kIssued = 0.6 * 4 * 1.5e9;  // instructions a second and multiprocessor: 60 % of 4 a clock, 1.5 GHz
constexpr double kCublas = 0.70;        // of the fp16 rate, for matrices that fill the machine
constexpr int kCublasRows = 64;         // of its tiles, at least: fewer rows cost as much
// Of the fp16 rate, by tokens: the conversion of an operand hides behind its products with 256, hardly with 64.
constexpr double kHopperRate64 = 0.35, kHopperRate128 = 0.48, kHopperRate256 = 0.55;
constexpr double kLaunch = 2.5e-6;      // of a product: launch, first load from memory, last store
constexpr double kNextLaunch = 1.5e-6;  // of a kernel behind another one: the first is still running when it is sent
constexpr double kReduction = 0.7e-6;   // counters, and the last CTA's sum over the others
constexpr int64_t kChunkBytes = 24 << 20;  // of dequantized columns; half of the cache of A100 (40 MB) and H100 (50 MB)

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

double element_bytes(const Layout& layout) { return layout.element == Element::kFloat ? 4 : 2; }

// Rows of x as the kernels take them.
double row_bytes(const Layout& layout, int64_t m) { return double(m * layout.padded_k) * 2; }

// Bytes of memory beside the weight: x is prepared and read, y is written.
double activation_bytes(const Layout& layout, int64_t m) {
  const double x = row_bytes(layout, m);
  const double prepared = layout.takes_x_as_it_is() ? 0 : double(m * layout.k) * element_bytes(layout) + x;
  return prepared + x + double(m * layout.n) * element_bytes(layout);
}

// Bytes that CTAs read from the second-level cache: every row of them the weight, every column x; sums are written, too.
double cached_bytes(const Layout& layout, int64_t m, const Plan& plan) {
  return double(layout.bytes()) * double(plan.grid_m) + row_bytes(layout, m) * double(plan.grid_n) +
         2 * double(plan.scratch_bytes);
}

double launches(const Layout& layout, double others) {
  return kLaunch + (others + (layout.takes_x_as_it_is() ? 0 : 1)) * kNextLaunch;
}

double flops(const Layout& layout, double rows) { return 2 * rows * double(layout.padded_k) * double(layout.padded_n); }

// Part of the bandwidth that `ctas` draw, each with `in_flight` bytes asked for at a time, `resident` at once on one
// multiprocessor.
double reach(const Machine& machine, double ctas, double resident, double in_flight) {
  const double busy = std::min(1.0, ctas / machine.multiprocessors);
  const double at_once = std::min(std::max(1.0, ctas / machine.multiprocessors), resident);
  const double needed = kBurst * kLatency * machine.bytes_per_second / machine.multiprocessors;
  return std::min(1.0, busy * std::min(kSmShare, at_once * in_flight / needed));
}

// Work of the multiprocessor that has least, over work of the one that has most.
double balance(const Machine& machine, double ctas) {
  return ctas / double(div_up(int64_t(ctas), machine.multiprocessors) * machine.multiprocessors);
}

double decode_seconds(const Layout& layout, int64_t m, const Machine& machine, const Plan& plan, const Tile& tile) {
  const double ctas = double(plan.grid_n * plan.grid_m * plan.split), bandwidth = machine.bytes_per_second * kBandwidth;
  const double resident = std::min<double>(tile.resident,
                                           double(machine.shared_total / (plan.shared_bytes + kReserved)));
  const double in_flight = double((plan.stages - 1) * stage_codes(layout.bits, plan.tokens));
  const double memory = (double(layout.bytes()) + activation_bytes(layout, m)) /
                        (bandwidth * reach(machine, ctas, std::max(1.0, resident), in_flight));
  const double cached = cached_bytes(layout, m, plan) / (bandwidth * kCacheRatio);
  const double tensor = flops(layout, double(plan.grid_m * plan.tokens)) / (machine.half_per_second * kMmaSync);
  const double operands = double(plan.grid_m * layout.padded_k * layout.padded_n) / (kTile * kTile);
  const double issue = operands * (kConversion + kPerEight * plan.tokens / 8) / (kIssued * machine.multiprocessors);
  const double arithmetic = std::max(tensor, issue) / balance(machine, ctas);
  return launches(layout, 0) + (plan.split > 1 ? kReduction : 0) + std::max({memory, cached, arithmetic});
}

// ---- Splitting sums over k

// The plan with the split of least seconds(plan): each CTA of a sum takes ceil(units / split) units, at least `least`
// but for the last one, and there are `room` CTAs at most where sums are split.
template <typename Seconds>
Plan best_split(const Layout& layout, Plan plan, int64_t units, int64_t least, int64_t room, Seconds seconds) {
  const int64_t tiles = plan.grid_n * plan.grid_m;
  const int64_t most = std::max<int64_t>(1, std::min({int64_t(kMaxSplit), units / least, room / tiles}));
  Plan best{};
  for (int64_t wanted = 1; wanted <= most; ++wanted) {
    plan.split = int(div_up(units, div_up(units, wanted)));  // fewer, where some would be left without a unit
    plan.scratch_bytes = plan.split > 1 ? plan.split * plan.grid_m * plan.tokens * layout.padded_n * 4 : 0;
    plan.counters = plan.split > 1 ? tiles : 0;
    plan.predicted_seconds = seconds(plan);
    if (wanted == 1 || plan.predicted_seconds < best.predicted_seconds) best = plan;
  }
  return best;
}

// ---- kDecode

// The tile that covers m, or a smaller one where the machine's shared memory does not hold two stages of it; in the
// most stages that it holds.
Plan decode_tile(const Layout& layout, int64_t m, const Machine& machine, Tile& tile) {
  const int count = int(sizeof kTilesOfDecode / sizeof *kTilesOfDecode);
  int index = 0;
  while (index + 1 < count && kTilesOfDecode[index].tokens < m) ++index;
  for (; index >= 0; --index) {
    tile = kTilesOfDecode[index];
    for (int stages = tile.stages; stages >= kMinStages; --stages) {
      const int64_t shared = decode_shared_bytes(layout.element, layout.bits, tile.tokens, stages);
      if (shared > machine.shared_bytes) continue;
      Plan plan{};
      plan.route = Route::kDecode;
      plan.tokens = tile.tokens;
      plan.block_n = decode_blocks(tile.tokens) * kBlockN;
      plan.stages = stages;
      plan.threads = decode_threads(tile.tokens);
      plan.shared_bytes = shared;
      return plan;
    }
  }
  throw std::runtime_error("no kernel fits the shared memory of this device");
}

Plan decode_plan(const Layout& layout, int64_t m, const Machine& machine) {
  if (layout.padded_k > kMaxK || layout.padded_n > kMaxN) {
    throw std::runtime_error("the weight is too large: 2^21 rows (filled up) are computed at most");
  }
  Tile tile;
  Plan plan = decode_tile(layout, m, machine, tile);
  plan.grid_n = div_up(layout.padded_n, plan.block_n);
  plan.grid_m = div_up(m, plan.tokens);
  const int64_t units = div_up(layout.padded_k, kUnitK), room = kMaxCtas * machine.multiprocessors;
  return best_split(layout, plan, units, kMinUnits, room,
                    [&](const Plan& one) { return decode_seconds(layout, m, machine, one, tile); });
}

// ---- kDequantize

Plan dequantize_plan(const Layout& layout, int64_t m, const Machine& machine) {
  Plan plan{};
  plan.route = Route::kDequantize;
  const int64_t column = layout.padded_k * 2;  // bytes
  const int64_t most = std::max<int64_t>(1, kChunkBytes / column / kBlockN) * kBlockN;
  const int64_t chunks = div_up(layout.padded_n, most);
  plan.chunk = round_up(div_up(layout.padded_n, chunks), kBlockN);  // of equal size: a short last one fills no machine
  plan.scratch_bytes = plan.chunk * column;
  const double bandwidth = machine.bytes_per_second * kBandwidth;
  const double conversion = double(layout.bytes()) / bandwidth +
                            double(layout.padded_n * column) / (bandwidth * kCacheRatio);
  const double operands = double(layout.padded_n * column) / kCacheRatio + activation_bytes(layout, m) +
                          row_bytes(layout, m) * double(chunks - 1) / kCacheRatio;
  const double finish = 2 * double(m * layout.n) * element_bytes(layout) / bandwidth;
  const double arithmetic = flops(layout, double(round_up(m, kCublasRows))) / (machine.half_per_second * kCublas);
  plan.predicted_seconds = launches(layout, double(2 * chunks)) + conversion + finish +
                           std::max(operands / bandwidth, arithmetic);
  return plan;
}

// ---- kHopper

bool hopper_possible(const Layout& layout, const Machine& machine, const Available& available) {
  return available.hopper && machine.architecture == 90 && hopper::supports(layout) &&
         machine.shared_bytes >= hopper::kSharedLimit;
}

double hopper_seconds(const Layout& layout, int64_t m, const Machine& machine, const Plan& plan) {
  const double ctas = double(plan.grid_n * plan.grid_m * plan.split), bandwidth = machine.bytes_per_second * kBandwidth;
  const double in_flight = double((plan.stages - 1) * hopper::kConsumers * hopper::kBlockBytes);
  const double memory = (double(layout.bytes()) + activation_bytes(layout, m)) /
                        (bandwidth * reach(machine, ctas, 1, in_flight));
  const double cached = cached_bytes(layout, m, plan) / (bandwidth * kCacheRatio);
  const double rate = plan.tokens == 64 ? kHopperRate64 : plan.tokens == 128 ? kHopperRate128 : kHopperRate256;
  const double arithmetic = flops(layout, double(plan.grid_m * plan.tokens)) /
                            (machine.half_per_second * rate * balance(machine, ctas));
  return launches(layout, 0) + (plan.split > 1 ? kReduction : 0) + std::max({memory, cached, arithmetic});
}

// The best of the tiles that m fills, but for the smallest one.
Plan hopper_plan(const Layout& layout, int64_t m, const Machine& machine) {
  Plan best{};
  for (const int tokens : hopper::kTokenTiles) {
    if (best.tokens && tokens / 2 >= m) break;
    Plan plan{};
    plan.route = Route::kHopper;
    plan.tokens = tokens;
    plan.block_n = hopper::kColumns;
    plan.stages = hopper::stages(tokens);
    plan.threads = hopper::kThreads;
    plan.grid_n = div_up(layout.padded_n, plan.block_n);
    plan.grid_m = div_up(m, tokens);
    plan.shared_bytes = hopper::shared_bytes(tokens);
    plan = best_split(layout, plan, layout.steps(), kMinSteps, machine.multiprocessors,
                      [&](const Plan& one) { return hopper_seconds(layout, m, machine, one); });
    if (!best.tokens || plan.predicted_seconds < best.predicted_seconds) best = plan;
  }
  return best;
}

// Routes that have computed right results on a GPU. The others are taken only by force.
constexpr bool kHopperVerified = false;

}  // namespace

Plan make_plan(const Layout& layout, int64_t m, const Machine& machine, const Available& available, int forced) {
  m = std::min(m, kMaxRows);
  if (forced == int(Route::kDecode)) return decode_plan(layout, m, machine);
  if (forced == int(Route::kDequantize)) {
    if (!available.cublas) throw std::runtime_error("route 1 needs cuBLAS, which was not found");
    return dequantize_plan(layout, m, machine);
  }
  if (forced == int(Route::kHopper)) {
    if (!hopper_possible(layout, machine, available)) {
      throw std::runtime_error("route 2 needs sm_90, 4 bits, fp16 or bf16, and a library built with it");
    }
    return hopper_plan(layout, m, machine);
  }
  Plan best = decode_plan(layout, m, machine);
  const auto consider = [&best](const Plan& plan) {
    if (plan.predicted_seconds < best.predicted_seconds) best = plan;
  };
  if (available.cublas) consider(dequantize_plan(layout, m, machine));
  if (kHopperVerified && hopper_possible(layout, machine, available)) consider(hopper_plan(layout, m, machine));
  return best;
}

}  // namespace qcompile::cuda
