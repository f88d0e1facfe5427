// The decode kernel on the emulator against float64, its bit tricks one by one, and faults that the emulator must find.
//
//   cuda_check [--sabotage code|scale]
//
// One line each part: cases, failures, worst errors. Exit code 1 if anything failed. --sabotage plants one fault into
// the packed weight, so that a test can see the check fail. Needs no CUDA and no GPU. What it cannot show: that a GPU
// does what the emulator takes the PTX ISA to say.

#include "check_dequant.h"
#include "check_faults.h"
#include "check_product.h"
#include "../decode_epilogue.h"
#include "../emulator/emulator.h"

using namespace qcompile::cuda;
using check::Random;

namespace {

// Error of a sum of fp32 products, relative to the sum of their magnitudes, apart from the rounding of y. One rounding
// of 2^-24 for each multiplication of 16 k, for each group twice, for 4 warps and 5 CTAs: 150 at most here, 9e-6.
constexpr double kLimit = 1e-5;

std::string sabotage;

// ---- The kernel

using Kernel = void (*)(const DecodeArguments&);

template <Element element, int bits>
Kernel kernel_of(int tokens) {
  switch (tokens) {
    case 8: return decode<element, bits, 1>;
    case 16: return decode<element, bits, 2>;
    case 32: return decode<element, bits, 4>;
    default: return decode<element, bits, 8>;
  }
}

Kernel kernel_of(const Case& c) {
  const bool four = c.bits == 4;
  switch (c.element) {
    case Element::kHalf: return four ? kernel_of<Element::kHalf, 4>(c.tokens) : kernel_of<Element::kHalf, 8>(c.tokens);
    case Element::kBfloat16:
      return four ? kernel_of<Element::kBfloat16, 4>(c.tokens) : kernel_of<Element::kBfloat16, 8>(c.tokens);
    default: return four ? kernel_of<Element::kFloat, 4>(c.tokens) : kernel_of<Element::kFloat, 8>(c.tokens);
  }
}

// What a launch may do wrong.
struct Wrong {
  int stages = 0;    // that the kernel is told; 0: as many as there is memory for
  size_t rows = 0;   // by which x is too short
  int memory = 0;    // bytes of shared memory that are missing
};

// y on the emulator, between guard zones of poison. Throws emulator::Error.
std::vector<uint8_t> run(const CheckedProduct& p, uint64_t seed, Report& report, const Wrong& wrong = {}) {
  const Case& c = p.c;
  DecodeArguments a = decode_arguments(p.layout, c.m, c.split, wrong.stages ? wrong.stages : c.stages);
  const int blocks = decode_blocks(c.tokens), grid_n = (a.blocks + blocks - 1) / blocks;
  const int grid_m = int((c.m + c.tokens - 1) / c.tokens);
  const size_t bytes = size_t(c.m * c.n) * size_t(p.numbers.width()), guard = 64;
  std::vector<uint8_t> y(bytes + 2 * guard, 0xff);
  std::vector<float> partials(size_t(c.split) * size_t(grid_m * c.tokens) * size_t(a.padded_n) + 4, std::nanf(""));
  std::vector<uint32_t> counters(size_t(grid_n * grid_m), 0);
  a.codes = p.codes, a.scales = p.scales, a.zeros = p.zeros;
  a.x = reinterpret_cast<const uint16_t*>(p.x);
  a.y = y.data() + guard;
  a.bias = c.bias ? p.bias.data() : nullptr;
  a.row_factor = c.element == Element::kFloat ? p.row_factor.data() : nullptr;
  a.partials = partials.data() + (reinterpret_cast<uintptr_t>(partials.data()) % 16 ? 2 : 0);
  a.counters = counters.data();
  emulator::Globals globals;
  globals.add(p.codes, size_t(p.layout.codes_bytes()), "codes");
  globals.add(p.scales, size_t(p.layout.scales_bytes()), "scales");
  globals.add(p.zeros, size_t(p.layout.zeros_bytes()), "zeros");
  globals.add(p.x, p.x_bytes() - wrong.rows * size_t(p.layout.padded_k) * 2, "x");
  globals.add(p.bias.data(), p.bias.size(), "bias");
  globals.add(p.row_factor.data(), p.row_factor.size() * 4, "row_factor");
  globals.add_written(a.y, bytes, "y");
  globals.add_written(a.partials, (partials.size() - 4) * 4, "partials");
  globals.add_written(a.counters, counters.size() * 4, "counters");
  const int shared = decode_shared_bytes(c.element, c.bits, c.tokens, c.stages) - wrong.memory;
  const Kernel kernel = kernel_of(c);
  emulator::run({{grid_n, c.split, grid_m}, decode_threads(c.tokens), shared, seed}, globals, [&] { kernel(a); });
  for (size_t i = 0; i < guard; ++i) {
    if (y[i] != 0xff || y[y.size() - 1 - i] != 0xff) report.fail("guard zone written: " + c.text());
  }
  for (uint32_t counter : counters) {
    if (counter) report.fail("a counter is left: " + c.text());
  }
  return {y.begin() + long(guard), y.end() - long(guard)};
}

void compare(const CheckedProduct& p, const std::vector<uint8_t>& y, Report& report, double& worst) {
  for (size_t i = 0; i < p.y.size(); ++i) {
    const double value = double(p.numbers.get(y.data(), i)), wanted = p.y[i];
    const double slack = p.numbers.rounding() * std::fabs(wanted) + p.numbers.smallest();
    if (std::fabs(wanted) > p.numbers.largest() && std::isinf(value) && value * wanted > 0) continue;
    const double error = std::fmax(0.0, std::fabs(value - wanted) - slack) / std::fmax(p.magnitude[i], 1e-30);
    worst = std::isnan(error) ? error : std::fmax(worst, error);
    if (!(error <= kLimit)) {
      return report.fail(p.c.text() + ": y[" + std::to_string(i) + "] is " + std::to_string(value) + ", not " +
                         std::to_string(wanted));
    }
  }
}

// Every m with both ways of n and k, the other properties in turn.
std::vector<Case> cases(Element element, int bits) {
  const int64_t ms[] = {1, 2, 7, 8, 9, 16, 17, 33, 64, 65}, ns[] = {1, 63, 64, 65, 130};
  const int64_t ks[] = {64, 192, 576, 640, 1088}, blocks[] = {32, 64, 128, 256, 0, 16, 192};
  std::vector<Case> all;
  for (int i = 0; i < 70; ++i) {
    const int64_t m = ms[i % 10], k = ks[(i / 2 + i / 10) % 5], block = blocks[(i + i / 7) % 7];
    const int fitting = m > 32 ? 64 : m > 16 ? 32 : m > 8 ? 16 : 8;
    const int tokens = i % 4 == 3 && fitting > 8 ? fitting / 2 : fitting;
    all.push_back({m, k, ns[(i + i / 5) % 5], block && block < k ? block : k, bits, element, i % 3 == 0, i % 2 == 0,
                   i % 5 < 2, i % 7 == 4, tokens, kMinStages + i % 3, 1 + i / 3 % 5,
                   uint64_t(i + 100 * bits + 1000 * int(element))});
  }
  return all;
}

int64_t check_kernel(const char* name, Element element, int bits) {
  Report report = {name};
  double worst = 0;
  for (const Case& c : cases(element, bits)) {
    ++report.cases;
    CheckedProduct p(c);
    if (sabotage == "code") p.codes[0] ^= 1;
    if (sabotage == "scale") p.scales[1] ^= 0x10;
    try {
      const std::vector<uint8_t> y = run(p, c.seed, report);
      compare(p, y, report, worst);
      if (y != run(p, c.seed + 12345, report)) report.fail("another order of blocks, other bits: " + c.text());
    } catch (const emulator::Error& error) {
      report.fail(c.text() + ": " + error.what());
    }
  }
  std::printf("%-16s %lld cases, %lld failures, worst error %.1e of sum |x w| (limit %.0e)\n", name,
              (long long)report.cases, (long long)report.failures, worst, kLimit);
  std::fflush(stdout);
  return report.failures;
}

// ---- Faults

std::string message_of_launch(const Wrong& wrong, Report& report) {
  const CheckedProduct p({9, 1088, 70, 32, 4, Element::kHalf, false, true, false, false, 16, 3, 1, 1});
  try {
    run(p, 1, report, wrong);
    return "";
  } catch (const emulator::Error& error) {
    return error.what();
  }
}

// Small kernels with a fault each, then the decode kernel launched wrongly.
int64_t check_faults() {
  Report report = {"faults"};
  for (int fault = 0; fault < int(sizeof kFaults / sizeof *kFaults); ++fault) {
    const bool sums = fault >= kFirstSharedSum;
    report.failures += !is_found(kFaults[fault].name, kFaults[fault].reason, message_of_fault(fault, sums));
    ++report.cases;
  }
  report.failures += !is_found("none, sums", nullptr, message_of_fault(0, true));
  report.failures += !is_found("decode", nullptr, message_of_launch(Wrong{}, report));
  report.failures += !is_found("decode, one stage", "reads shared word", message_of_launch(Wrong{1, 0, 0}, report));
  report.failures += !is_found("decode, x too short", "out of bounds", message_of_launch(Wrong{0, 1, 0}, report));
  report.failures += !is_found("decode, too little memory", "is out of bounds", message_of_launch({0, 0, 16}, report));
  report.cases += 5;
  std::printf("%-16s %lld cases, %lld not as they must be\n", report.name, (long long)report.cases,
              (long long)report.failures);
  return report.failures;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--sabotage") == 0) sabotage = argv[2];
  int64_t failures = check_dequantization() + check_faults();
  failures += check_kernel("decode fp16 4", Element::kHalf, 4);
  failures += check_kernel("decode fp16 8", Element::kHalf, 8);
  failures += check_kernel("decode bf16 4", Element::kBfloat16, 4);
  failures += check_kernel("decode bf16 8", Element::kBfloat16, 8);
  failures += check_kernel("decode fp32 4", Element::kFloat, 4);
  failures += check_kernel("decode fp32 8", Element::kFloat, 8);
  return failures ? 1 : 0;
}
