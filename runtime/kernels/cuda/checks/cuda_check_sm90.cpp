// The Hopper kernel on the emulator against float64, and faults planted into its instructions. No GPU, no CUDA.
//
//   cuda_check_sm90 [--verbose]
//
// One line an element type: cases, failures, the worst errors beside their limits; one line for the faults. Exit code 1
// if any case failed or a fault went unnoticed. It cannot show that a GPU does what the emulator takes the PTX ISA to
// say.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../check_data.h"
#include "../hopper.h"
#include "../pack.h"

using namespace qcompile::cuda;
using check::Random;

namespace {

// Errors of a row of y, relative to what |y| is for independent x and W, beyond the rounding of y itself.
constexpr double kLimitSums = 1e-6;                   // against W rounded to the element: order of fp32 sums
constexpr double kLimitWeights[] = {0x1p-11, 0x1p-8};  // against W itself: what rounding to fp16 or bf16 does at most

bool verbose = false;

struct Case {
  int64_t m, k, n, block_size;
  int tokens, split;
  Element element;
  bool bias;
  uint64_t seed;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "m %d k %d n %d block %d tokens %d split %d%s seed %d", int(m), int(k), int(n),
                  int(block_size), tokens, split, bias ? " bias" : "", int(seed));
    return line;
  }
};

uint16_t to_bits(Element element, float value) {
  return element == Element::kHalf ? half_bits(value) : bfloat_bits(value);
}
float to_number(Element element, uint16_t bits) {
  return element == Element::kHalf ? half_number(bits) : bfloat_number(bits);
}

// Operands of a case. Codes and zero points are any bytes: rows that are filled up meet zeros in x.
struct Data {
  Data(const Case& c, Random random)
      : layout(make_layout(c.k, c.n, c.block_size, 4, c.element)), stride(layout.padded_k + 8 * int64_t(c.seed % 2)),
        codes(size_t(layout.codes_bytes())), zeros(size_t(layout.zeros_bytes())),
        scales(size_t(layout.groups() * layout.padded_n)), x(size_t(c.m * stride)), bias(size_t(c.n)),
        y(size_t(c.m * c.n), 0xffff), w(size_t(c.k * c.n)) {
    const int64_t tiles = (c.m + c.tokens - 1) / c.tokens;
    partials.assign(size_t(hopper::partials_bytes(layout, tiles, c.tokens, c.split) / 4), NAN);
    counters.assign(size_t(tiles * ((layout.blocks() + 1) / 2)), 0);
    for (uint8_t& byte : codes) byte = uint8_t(random.below(256));
    for (uint8_t& byte : zeros) byte = uint8_t(random.below(256));
    const double usual = c.seed % 3 ? 0.02 : 1e-3;  // the latter: fp16 weights down to 2^-12, scales / 16 below normal
    for (uint16_t& s : scales) {
      s = to_bits(c.element, float((0.2 + random.uniform()) * usual * (random.below(8) ? 1 : -1)));
    }
    for (uint16_t& b : bias) b = to_bits(c.element, float(random.normal()));
    values.resize(size_t(c.m * c.k));
    for (int64_t row = 0; row < c.m; ++row) {
      for (int64_t p = 0; p < layout.padded_k; ++p) {
        const int64_t k = source_row(layout, p);
        if (k < 0) continue;
        const uint16_t bits = to_bits(c.element, float(random.normal()));
        x[size_t(row * stride + p)] = bits;
        values[size_t(row * c.k + k)] = double(to_number(c.element, bits));
      }
    }
    unpack(layout, {codes.data(), reinterpret_cast<uint8_t*>(scales.data()), zeros.data()}, w.data());
  }

  Layout layout;
  int64_t stride;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales, x, bias, y;
  std::vector<float> w;        // (k, n)
  std::vector<float> partials;
  std::vector<uint32_t> counters;
  std::vector<double> values;  // x (m, k)
};

template <Element kElement, int kTokens>
void launch(const Case& c, Data& data, sm90::Fault fault) {
  const sm90::TensorMap map = {data.x.data(), data.layout.padded_k, c.m, data.stride * 2, kStepK, kTokens};
  hopper::Arguments arguments = {data.layout, data.codes.data(), reinterpret_cast<const uint8_t*>(data.scales.data()),
                                 data.zeros.data(), c.bias ? data.bias.data() : nullptr, data.y.data(), c.m,
                                 data.partials.data(), data.counters.data()};
  emulator::Globals globals;
  globals.add(data.codes.data(), data.codes.size(), "codes");
  globals.add(data.scales.data(), data.scales.size() * 2, "scales");
  globals.add(data.zeros.data(), data.zeros.size(), "zeros");
  globals.add(data.x.data(), data.x.size() * 2, "x");
  globals.add(data.bias.data(), data.bias.size() * 2, "bias");
  globals.add_written(data.y.data(), data.y.size() * 2, "y");
  globals.add_written(data.partials.data(), data.partials.size() * 4, "partials");
  globals.add_written(data.counters.data(), data.counters.size() * 4, "counters");
  emulator::Launch launch;
  launch.grid = {int((data.layout.blocks() + 1) / 2), c.split, int((c.m + kTokens - 1) / kTokens)};
  launch.threads = hopper::kThreads;
  launch.shared_bytes = int(hopper::shared_bytes(kTokens));
  launch.seed = c.seed;
  sm90::run(launch, globals, [&] { hopper::product<kElement, kTokens>(&map, arguments); }, fault);
}

template <Element kElement>
void launch(const Case& c, Data& data, sm90::Fault fault) {
  if (c.tokens == 64) return launch<kElement, 64>(c, data, fault);
  if (c.tokens == 128) return launch<kElement, 128>(c, data, fault);
  launch<kElement, 256>(c, data, fault);
}

// |y - x w| of a row beyond rounding, relative. Not a number where y has one.
double row_error(const Case& c, const Data& data, const std::vector<double>& w, int64_t row) {
  std::vector<double> x(data.values.begin() + row * c.k, data.values.begin() + (row + 1) * c.k), bias(size_t(c.n));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = c.bias ? double(to_number(c.element, data.bias[i])) : 0.0;
  const std::vector<double> expected = check::product(x, w, bias);
  double total = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double y = double(to_number(c.element, data.y[size_t(row * c.n) + i]));
    const double rounding = std::fabs(expected[i]) / (c.element == Element::kHalf ? 2048 : 256) + std::ldexp(1.0, -25);
    const double error = std::fabs(y - expected[i]) - rounding;
    if (!(error <= 0)) total += error * error;
  }
  return std::sqrt(total) * std::sqrt(double(c.k)) / (check::norm(x) * check::norm(w));
}

struct Report {
  int cases = 0, failures = 0;
  double worst_sums = 0, worst_weights = 0;
};

// Returns what is wrong, or nothing.
std::string run_case(const Case& c, sm90::Fault fault, Report& report) {
  Data data(c, Random(c.seed));
  try {
    c.element == Element::kHalf ? launch<Element::kHalf>(c, data, fault) : launch<Element::kBfloat16>(c, data, fault);
  } catch (const emulator::Error& error) {
    return error.what();
  }
  for (const uint32_t counter : data.counters) {
    if (counter) return "counters are not zeros behind the kernel";
  }
  std::vector<double> exact(data.w.begin(), data.w.end()), rounded(exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    rounded[i] = double(to_number(c.element, to_bits(c.element, data.w[i])));
  }
  double sums = 0, weights = 0;
  for (int64_t row = 0; row < c.m; ++row) {
    const double of_sums = row_error(c, data, rounded, row), of_weights = row_error(c, data, exact, row);
    sums = of_sums <= sums ? sums : of_sums;  // NaN is kept
    weights = of_weights <= weights ? weights : of_weights;
  }
  if (!(sums <= kLimitSums)) return "error of sums " + std::to_string(sums / kLimitSums) + " times the limit";
  const double limit = kLimitWeights[int(c.element)];
  if (!(weights <= limit)) return "error of weights " + std::to_string(weights / limit) + " times the limit";
  report.worst_sums = std::fmax(report.worst_sums, sums);
  report.worst_weights = std::fmax(report.worst_weights, weights);
  return "";
}

// Every tile with every kind of group; sizes that fill tiles and blocks, and some that do not. The deepest products go
// round the ring of stages more than once. block_size 0: k; 48 and 16 are filled up to 64 and 32 rows.
std::vector<Case> cases(Element element) {
  static const int64_t rows[] = {65, 257, 128, 200, 64, 1, 300};
  static const int64_t columns[] = {64, 200, 128, 192, 36, 101};
  static const int64_t depths[] = {640, 64, 320, 100, 512, 128, 900, 192};
  static const int64_t blocks[] = {32, 128, 0, 64, 256, 48, 16};
  std::vector<Case> all;
  for (int i = 0; i < 42; ++i) {
    const int64_t k = depths[i % 8], block = blocks[i % 7];
    all.push_back({rows[(i + i / 7) % 7], k, columns[i % 6], block && block < k ? block : k,
                   hopper::kTokenTiles[i % 3], i % 4 < 2 ? 1 : i % 4, element, i % 5 < 2, uint64_t(i + 1)});
  }
  all.push_back({70, 1664, 200, 128, 64, 1, element, true, 100});   // 12 stages, 26 steps
  all.push_back({130, 1664, 130, 32, 128, 1, element, false, 101});
  all.push_back({70, 640, 128, 128, 64, 7, element, true, 102});      // 2 steps a CTA; none for the last two
  return all;
}

bool check_element(Element element, const char* name) {
  Report report;
  for (const Case& c : cases(element)) {
    const std::string wrong = run_case(c, sm90::Fault::kNone, report);
    ++report.cases;
    if (!wrong.empty()) {
      ++report.failures;
      std::printf("  FAILED %s: %s\n", c.text().c_str(), wrong.c_str());
    } else if (verbose) {
      std::printf("  %s\n", c.text().c_str());
    }
  }
  std::printf("hopper %s: %d cases, %d failures, sums %.1e of %.1e, weights %.1e of %.1e\n", name, report.cases,
              report.failures, report.worst_sums, kLimitSums, report.worst_weights, kLimitWeights[int(element)]);
  return report.failures == 0;
}

// Each fault must be noticed: by the emulator, or in the numbers.
bool check_faults() {
  static const char* names[sm90::kFaults] = {
      "",           "no wait for full stages", "no wait for empty stages", "wrong parity",         "wrong stride",
      "no swizzle", "wrong address",           "no wgmma_wait<1>",         "no wgmma_wait<0>",     "no wgmma_fence",
      "no threads_barrier", "fewer bytes"};
  int missed = 0;
  for (int fault = 1; fault < sm90::kFaults; ++fault) {
    const Case c = {65, 640, 128, 128, 256, 1, Element::kHalf, false, uint64_t(fault)};
    Report unused;
    const std::string noticed = run_case(c, sm90::Fault(fault), unused);
    missed += noticed.empty();
    if (noticed.empty()) std::printf("  FAILED to notice: %s\n", names[fault]);
    if (verbose) std::printf("  %s: %s\n", names[fault], noticed.c_str());
  }
  std::printf("hopper faults noticed: %d cases, %d failures\n", sm90::kFaults - 1, missed);
  return missed == 0;
}

}  // namespace

int main(int count, char** arguments) {
  verbose = count > 1 && std::strcmp(arguments[1], "--verbose") == 0;
  const bool half = check_element(Element::kHalf, "fp16"), bfloat = check_element(Element::kBfloat16, "bf16");
  const bool faults = check_faults();
  return half && bfloat && faults ? 0 : 1;
}
