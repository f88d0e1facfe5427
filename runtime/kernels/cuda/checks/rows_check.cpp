// The row kernels (rows.h) on the emulator, against what they are defined to compute.
//
//   rows_check [--sabotage code|row]
//
// One line for each kernel. Exit code 1 if anything failed. --sabotage plants one fault, so that a test can see the
// check fail: a code of the packed weight off by one, or a row of x that is another one.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "../../check_data.h"
#include "../emulator/emulator.h"
#include "../pack.h"
#include "../rows.h"

using namespace qcompile::cuda;
using check::Guarded;
using check::Random;

namespace {

std::string sabotage;

struct Report {
  const char* name;
  int cases = 0, failures = 0;

  void fail(const std::string& what) {
    if (++failures <= 5) std::printf("  FAILED %s: %s\n", name, what.c_str());
  }
};

struct Case {
  int64_t k, n, block_size;
  int bits;
  Element element;
  bool is_signed, zero_points;
  uint64_t seed;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "k %lld n %lld block %lld bits %d element %d %s%s", (long long)k, (long long)n,
                  (long long)block_size, bits, int(element), is_signed ? "signed" : "unsigned",
                  zero_points ? " zero points" : "");
    return line;
  }
};

// ---- Elements in host memory, by their definitions in half.h and device.h

int width(Element element) { return element == Element::kFloat ? 4 : 2; }

float read_number(Element element, const uint8_t* data, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, data + index * width(element), size_t(width(element)));
  if (element == Element::kHalf) return qcompile::half_to_float(uint16_t(bits));
  return as_float(element == Element::kBfloat16 ? bits << 16 : bits);
}

void write_number(Element element, uint8_t* data, int64_t index, float value) {
  const uint32_t bits = element == Element::kHalf       ? qcompile::float_to_half(value)
                        : element == Element::kBfloat16 ? bfloat_bits(value)
                                                        : as_bits(value);
  std::memcpy(data + index * width(element), &bits, size_t(width(element)));
}

// The type of prepared rows and dequantized columns.
Element operand(Element element) { return element == Element::kBfloat16 ? element : Element::kHalf; }

bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : a == b; }

void run(int64_t grid_x, int64_t grid_y, int threads, int shared, uint64_t seed, emulator::Globals& globals,
         const std::function<void()>& kernel) {
  emulator::run({{int(grid_x), int(grid_y), 1}, threads, shared, seed}, globals, kernel);
}

// ---- A weight: as the file has it, packed, and as numbers

class Weight {
 public:
  Weight(const Case& c, Random& random)
      : layout(make_layout(c.k, c.n, c.block_size, c.bits, c.element)), codes(layout.codes_bytes()),
        scales(layout.scales_bytes()), zeros(layout.zeros_bytes()), w(size_t(c.k * c.n)) {
    const int64_t groups = (c.k + c.block_size - 1) / c.block_size;
    const int last = (1 << c.bits) - 1, half = c.is_signed ? 1 << (c.bits - 1) : 0;
    std::vector<uint8_t> file_codes(size_t(c.k * c.n)), file_zeros(size_t(groups * c.n));
    std::vector<uint8_t> file_scales(size_t(groups * c.n) * 4);
    for (uint8_t& zero : file_zeros) zero = uint8_t(random.below(last + 1));
    for (int64_t i = 0; i < groups * c.n; ++i) {
      write_number(c.element, file_scales.data(), i, float((0.2 + random.uniform()) * (random.below(4) ? 0.1 : -0.1)));
    }
    for (int64_t i = 0; i < c.k * c.n; ++i) {
      const int code = random.below(last + 1);
      const int64_t group = i / c.n / c.block_size * c.n + i % c.n;
      const int zero = c.zero_points ? int(file_zeros[size_t(group)]) : half;  // of codes moved to 0 … last
      file_codes[size_t(i)] = uint8_t((code - half) & last);
      w[size_t(i)] = float(code - zero) * read_number(c.element, file_scales.data(), group);
    }
    for (uint8_t& zero : file_zeros) zero = uint8_t((zero - half) & last);
    const std::vector<uint8_t> stored = in_file(file_codes, c.bits), stored_zeros = in_file(file_zeros, c.bits);
    pack_blocks(layout, {stored.data(), file_scales.data(), c.element != Element::kFloat,
                         c.zero_points ? stored_zeros.data() : nullptr, c.is_signed},
                0, layout.blocks(), {codes.data(), scales.data(), zeros.data()});
    if (sabotage == "code" && c.seed == 1) codes[0] ^= 1;
  }

  Layout layout;
  Guarded<uint8_t> codes, scales, zeros;
  std::vector<float> w;  // (k, n)

 private:
  static std::vector<uint8_t> in_file(const std::vector<uint8_t>& values, int bits) {
    if (bits == 8) return values;
    std::vector<uint8_t> pairs((values.size() + 1) / 2);
    for (size_t i = 0; i < values.size(); ++i) pairs[i / 2] = uint8_t(pairs[i / 2] | values[i] << (4 * (i % 2)));
    return pairs;
  }
};

// ---- dequantize

void check_dequantize(const Case& c, const Weight& weight, int64_t first, Report& report) {
  const Layout& layout = weight.layout;
  const int64_t count = std::min<int64_t>(layout.n - first, 128);
  Guarded<uint8_t> out(count * layout.padded_k * 2);
  emulator::Globals globals;
  globals.add(weight.codes.data(), size_t(weight.codes.size()), "codes");
  globals.add(weight.scales.data(), size_t(weight.scales.size()), "scales");
  globals.add(weight.zeros.data(), size_t(weight.zeros.size()), "zeros");
  globals.add_written(out.data(), size_t(out.size()), "out");
  const auto kernel = c.element == Element::kHalf       ? dequantize_step<Element::kHalf>
                      : c.element == Element::kBfloat16 ? dequantize_step<Element::kBfloat16>
                                                        : dequantize_step<Element::kFloat>;
  run(layout.steps(), round_up(count, kBlockN) / kBlockN, kDequantizeThreads, kDequantizeShared, c.seed, globals, [&] {
    kernel(layout, weight.codes.data(), weight.scales.data(), weight.zeros.data(), first, count, out.data());
  });
  ++report.cases;
  for (int64_t column = 0; column < count; ++column) {
    for (int64_t p = 0; p < layout.padded_k; ++p) {
      const int64_t row = source_row(layout, p);
      uint8_t rounded[4] = {};
      write_number(operand(c.element), rounded, 0, row < 0 ? 0 : weight.w[size_t(row * layout.n + first + column)]);
      const float expected = read_number(operand(c.element), rounded, 0);
      const float got = read_number(operand(c.element), out.data(), column * layout.padded_k + p);
      if (same(got, expected)) continue;
      return report.fail(c.text() + ": column " + std::to_string(first + column) + " k " + std::to_string(p) + " is " +
                         std::to_string(got) + " for " + std::to_string(expected));
    }
  }
}

// ---- prepare

enum Row { kPlain, kZero, kHuge, kSmall, kDenormal, kNan, kInfinity, kInfinities, kRows };

float activation(int row, int64_t k, Random& random) {
  const float plain = float(random.normal()), infinity = std::numeric_limits<float>::infinity();
  switch (row) {
    case kZero: return k % 2 ? 0.0f : -0.0f;
    case kHuge: return plain * 5e37f;
    case kSmall: return plain * 1e-30f;
    case kDenormal: return plain * 1e-40f;
    case kNan: return k == 3 ? std::nanf("") : plain;
    case kInfinity: return k == 2 ? -infinity : plain;
    case kInfinities: return k % 3 == 1 ? (k % 2 ? infinity : -infinity) : plain;
    default: return plain;
  }
}

// x as prepared, times the factor, against x: within what fp16 rounds, and what fp32 has lost already below 2^-126.
void check_element(const Case& c, int row, float x, double got, double factor, Report& report) {
  const double step = c.element == Element::kFloat ? std::fmax(std::fabs(x) / 2048, factor * std::ldexp(1.0, -25)) : 0;
  const bool right = std::isfinite(x) ? std::fabs(got - x) <= step : same(float(got), x);
  if (!right) {
    report.fail(c.text() + ": row " + std::to_string(row) + ": " + std::to_string(got) + " for " + std::to_string(x));
  }
}

void check_factor(const Case& c, int row, float largest, float factor, Report& report) {
  int exponent;
  const bool power = std::frexp(factor, &exponent) == 0.5f;
  const float scaled = largest / factor;
  const bool in_range = largest == 0 ? factor == 1
                                     : scaled < 32768 && (scaled >= 16384 || factor == std::ldexp(1.0f, -126));
  if (power && in_range) return;
  report.fail(c.text() + ": factor " + std::to_string(factor) + " of row " + std::to_string(row));
}

void check_prepare(const Case& c, Random& random, Report& report) {
  const Layout layout = make_layout(c.k, c.n, c.block_size, c.bits, c.element);
  Guarded<uint8_t> x(kRows * c.k * width(c.element)), prepared(kRows * layout.padded_k * 2);
  Guarded<float> factors(kRows);
  for (int64_t i = 0; i < kRows * c.k; ++i) {
    write_number(c.element, x.data(), i, activation(int(i / c.k), i % c.k, random));
  }
  emulator::Globals globals;
  globals.add(x.data(), size_t(x.size()), "x");
  globals.add_written(prepared.data(), size_t(prepared.size()), "prepared");
  globals.add_written(factors.data(), size_t(kRows) * 4, "factors");
  const auto kernel = c.element == Element::kHalf       ? prepare_row<Element::kHalf>
                      : c.element == Element::kBfloat16 ? prepare_row<Element::kBfloat16>
                                                        : prepare_row<Element::kFloat>;
  run(kRows, 1, kRowThreads, kPrepareShared, c.seed, globals,
      [&] { kernel(layout, x.data(), prepared.data(), factors.data()); });
  ++report.cases;
  for (int row = 0; row < kRows; ++row) {
    const int from = sabotage == "row" && row == 0 ? 2 : row;
    const float factor = c.element == Element::kFloat ? factors[row] : 1;
    float largest = 0;
    for (int64_t p = 0; p < layout.padded_k; ++p) {
      const int64_t k = source_row(layout, p);
      const float value = k < 0 ? 0 : read_number(c.element, x.data(), from * c.k + k);
      if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
      const float got = read_number(operand(c.element), prepared.data(), row * layout.padded_k + p);
      check_element(c, row, value, double(got) * double(factor), double(factor), report);
    }
    if (c.element == Element::kFloat) check_factor(c, row, largest, factor, report);
  }
}

// ---- finish

void check_finish(const Case& c, bool with_factor, bool with_bias, Random& random, Report& report) {
  constexpr int64_t m = 3;
  Guarded<uint8_t> y(m * c.n * width(c.element)), bias(c.n * width(c.element));
  Guarded<float> factors(m);
  for (int64_t i = 0; i < m * c.n; ++i) write_number(c.element, y.data(), i, float(random.normal()));
  for (int64_t i = 0; i < c.n; ++i) write_number(c.element, bias.data(), i, float(random.normal()));
  for (int64_t row = 0; row < m; ++row) factors[row] = std::ldexp(1.0f, int(row) - 1);
  const std::vector<uint8_t> before(y.data(), y.data() + y.size());
  emulator::Globals globals;
  globals.add(bias.data(), size_t(bias.size()), "bias");
  globals.add(factors.data(), size_t(m) * 4, "factors");
  globals.add_written(y.data(), size_t(y.size()), "y");
  const auto kernel = c.element == Element::kHalf       ? finish_row<Element::kHalf>
                      : c.element == Element::kBfloat16 ? finish_row<Element::kBfloat16>
                                                        : finish_row<Element::kFloat>;
  run(m, 1, kRowThreads, 0, c.seed, globals, [&] {
    kernel(c.n, y.data(), with_factor ? factors.data() : nullptr, with_bias ? bias.data() : nullptr);
  });
  ++report.cases;
  for (int64_t i = 0; i < m * c.n; ++i) {
    const double factor = with_factor ? double(factors[i / c.n]) : 1;
    const double plus = with_bias ? double(read_number(c.element, bias.data(), i % c.n)) : 0;
    const double expected = double(read_number(c.element, before.data(), i)) * factor + plus;
    uint8_t rounded[4] = {};
    write_number(c.element, rounded, 0, float(expected));  // the fp32 sum, then the element
    const float got = read_number(c.element, y.data(), i);
    if (got != read_number(c.element, rounded, 0)) return report.fail(c.text() + ": " + std::to_string(got));
  }
}

constexpr int64_t kShapes[][3] = {{64, 64, 64},   {70, 13, 32},  {96, 130, 32}, {100, 65, 16}, {96, 70, 48},
                                  {200, 33, 200}, {161, 9, 100}, {33, 3, 1},    {256, 64, 128}, {5, 1, 8}};

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "--sabotage") sabotage = arguments[2];
  Report dequantize{"dequantize"}, prepare{"prepare"}, finish{"finish"};
  uint64_t seed = 0;
  for (const auto& shape : kShapes) {
    for (const int bits : {4, 8}) {
      for (const Element element : {Element::kHalf, Element::kBfloat16, Element::kFloat}) {
        const Case c{shape[0], shape[1], shape[2], bits, element, ++seed % 2 == 0, seed / 2 % 2 == 0, seed};
        Random random(seed);
        const Weight weight(c, random);
        for (int64_t first = 0; first < c.n; first += 64) check_dequantize(c, weight, first, dequantize);
        if (bits == 8) continue;  // x does not depend on it
        check_prepare(c, random, prepare);
        for (int which = 0; which < 4; ++which) check_finish(c, which & 1, which & 2, random, finish);
      }
    }
  }
  int failures = 0;
  for (const Report& report : {dequantize, prepare, finish}) {
    std::printf("%s %d cases %d failures\n", report.name, report.cases, report.failures);
    failures += report.failures;
  }
  return failures ? 1 : 0;
}
