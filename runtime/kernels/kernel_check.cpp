// Every instruction set against float64 and against `reference`, without ONNX Runtime.
//
//   kernel_check [--sabotage code|activation|cache|guard] [NAME …]     names of kernel sets; all that this machine runs
//
// One line a path: how many products, tiles and conversions, the worst errors beside their limits. Exit code 1 if any
// failed. --sabotage plants one fault, so that a test can see the check fail.

#include <atomic>
#include <thread>

#include "check_attention.h"
#include "check_data.h"
#include "matmul.h"

using namespace qcompile;
using namespace check;

namespace {

// Errors of a row are norms, relative to what |y| is for independent x and W: |x| |W| / sqrt(K).
constexpr double kLimit16 = 1.2e-4;       // 16-bit activations against float64: the worst of all rows, some with outliers
constexpr double kLimitCodes = 1e-5;      // 8- and 16-bit ones against float64 of the same integers
constexpr double kLimitReference = 1e-6;  // a tile against the reference: only the order of float operations differs

std::string sabotage;

struct Report {
  int products = 0, tiles = 0, conversions = 0, gates = 0, turns = 0, attentions = 0, failures = 0;
  double worst_attention = 0, worst16 = 0, worst_codes = 0, worst_reference = 0;

  void fail(const std::string& where, const std::string& what) {
    if (++failures <= 10) std::printf("  FAILED %s: %s\n", where.c_str(), what.c_str());
  }
  void error(double error, double limit, double& worst, const std::string& where, const char* what) {
    worst = std::isnan(error) ? error : std::fmax(worst, error);
    if (!(error <= limit)) fail(where, std::string(what) + " error, times the limit: " + std::to_string(error / limit));
  }
};

// Work in the order that threads happen to take it.
void run_threads(void*, void (*piece)(void*, size_t), size_t total, void* data) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (size_t i; (i = next++) < total;) piece(data, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- whole products ----

std::vector<float> multiply(const PackedWeight& weight, const Case& c, const Activations& x, const PanelBits& bits,
                            const Parallel& parallel) {
  Guarded<float> y(c.half ? 0 : c.m * c.n);
  Guarded<uint16_t> halves(c.half ? c.m * c.n : 0);
  void* out = c.half ? static_cast<void*>(halves.data()) : y.data();
  weight.multiply(x.x(), c.half ? Element::kHalf : Element::kFloat, c.m, out, x.bias_elements(), bits, parallel);
  std::vector<float> values(size_t(c.m * c.n));
  for (size_t i = 0; i < values.size(); ++i) values[i] = c.half ? half_to_float(halves[int64_t(i)]) : y[int64_t(i)];
  return values;
}

// What the element type itself cannot tell apart is no error of the product.
double beyond_rounding(double y, double expected, const Case& c) {
  if (c.half && std::fabs(expected) > 65000) return std::fabs(y) > 60000 && (y > 0) == (expected > 0) ? 0 : INFINITY;
  const double ulp = c.half ? std::fmax(std::fabs(expected) / 2048, std::ldexp(1.0, -25))
                            : double(c.k) * std::ldexp(1.0, -149);
  return std::fmax(0, std::fabs(y - expected) - ulp);
}

double relative_error(const Case& c, const std::vector<double>& x, const Weight& weight, const Activations& activations,
                      const float* y) {
  const std::vector<double> expected = product(x, weight.w, activations.bias);
  std::vector<double> error(size_t(c.n));
  for (size_t n = 0; n < error.size(); ++n) error[n] = beyond_rounding(y[n], expected[n], c);
  const double usual = norm(x) * norm(weight.w) / std::sqrt(double(c.k)), total = norm(error);
  return total == 0 ? 0 : total / std::fmax(usual, norm(expected));
}

// NaN where float64 has one, infinity with its sign where it has one.
void check_same_class(const Case& c, const std::vector<double>& expected, const float* y, Report& report) {
  for (size_t n = 0; n < expected.size(); ++n) {
    const bool same = std::isnan(expected[n]) ? std::isnan(y[n]) : double(y[n]) == expected[n];
    if (!same) {
      return report.fail(c.text(), "column " + std::to_string(n) + " is " + std::to_string(y[n]) + " for " +
                                       std::to_string(expected[n]));
    }
  }
}

void check_row(const Case& c, const Layout& layout, const Weight& weight, const Activations& x, int64_t m,
               const float* y, Report& report) {
  const float* row = x.values.data() + m * c.k;
  const std::vector<double> exact(row, row + c.k);
  if (!is_finite(x.kinds[size_t(m)])) return check_same_class(c, product(exact, weight.w, x.bias), y, report);
  const std::vector<double> seen = quantized(layout, row, c.activation_bits == 16 ? 32512.0f : 127.0f);
  report.error(relative_error(c, seen, weight, x, y), kLimitCodes, report.worst_codes, c.text(), "arithmetic");
  // A norm over few columns is a matter of luck, and so is one over columns that are alike but for their scale.
  if (c.activation_bits == 8 || c.n < 32 || weight.saturated) return;
  report.error(relative_error(c, exact, weight, x, y), kLimit16, report.worst16, c.text(), "a16");
}

bool same_bits(const float* a, const float* b, int64_t count) { return std::memcmp(a, b, size_t(count) * 4) == 0; }

void check_unpacked(const PackedWeight& packed, const Weight& weight, const Case& c, Report& report) {
  Guarded<float> w(c.k * c.n);
  packed.unpack(w.data());
  for (int64_t i = 0; i < w.size(); ++i) {
    if (w[i] == float(weight.w[size_t(i)])) continue;
    return report.fail(c.text(), "element " + std::to_string(i) + " does not unpack");
  }
}

// Where some columns take 8 bits and others 16, each panel is that of a product whose columns all take its bits.
void check_mixed(const PackedWeight& packed, const Case& c, const Activations& x, Report& report) {
  const Layout& layout = packed.layout();
  const auto of = [&](int bits, const std::vector<int64_t>& columns_at_8) {
    return multiply(packed, c, x, PanelBits(layout, bits, columns_at_8), Parallel{run_threads, nullptr});
  };
  const std::vector<float> at_8 = of(8, {}), at_16 = of(16, {});
  const std::vector<float> first = of(16, {0, kPanel}), rest = of(16, {1, kPanel, kPanel, c.n});
  for (int64_t m = 0; m < c.m; ++m) {
    const auto equal = [&](const std::vector<float>& a, const std::vector<float>& b, int64_t begin, int64_t end) {
      const size_t at = size_t(m * c.n + begin);
      if (!same_bits(&a[at], &b[at], end - begin)) report.fail(c.text(), "columns of other bits changed a panel");
    };
    equal(first, at_8, 0, kPanel);
    equal(first, at_16, kPanel, c.n);
    equal(rest, at_16, 0, kPanel);  // column 0 takes 16 bits, and its panel with it
    equal(rest, at_8, kPanel, c.n);
  }
}

void check_product(const Kernels* kernels, const Case& c, Report& report) {
  if (!kernels->products.of[c.format].multiply) return;
  Random random(c.seed);
  Weight weight(c, random);
  Activations x(c, random);
  const bool faulty = sabotage == "code" && c.seed == 1;
  if (faulty) weight.sabotage();
  const Source source = weight.source();
  const PackedWeight packed(make_layout(c.k, c.n, c.block_size, c.format, source), source, kernels);
  if (!faulty) check_unpacked(packed, weight, c, report);
  const PanelBits bits(packed.layout(), c.activation_bits);
  const std::vector<float> y = multiply(packed, c, x, bits, serial());
  ++report.products;
  for (int64_t m = 0; m < c.m; ++m) check_row(c, packed.layout(), weight, x, m, &y[size_t(m * c.n)], report);
  for (int64_t m = 0; m < c.m; ++m) {
    if (!is_finite(x.kinds[size_t(m)])) x.clear(m);
  }
  // Threads, and rows that are not finite, change no bit of the others.
  const std::vector<float> again = multiply(packed, c, x, bits, Parallel{run_threads, nullptr});
  for (int64_t m = 0; m < c.m; ++m) {
    const size_t at = size_t(m * c.n);
    if (is_finite(x.kinds[size_t(m)]) && !same_bits(&y[at], &again[at], c.n)) report.fail(c.text(), "a row changed");
  }
  if (c.n > kPanel) check_mixed(packed, c, x, report);
}

// Sorts of weights and activations of one format. What codes with a table lack (signs, zero points) is left out, and so are
// signs of fields of bits.
int64_t sorts_of(const Format& format) { return !format.zeros() ? 12 : format.base() < 0 ? 72 : 36; }

Case sort_of(int format, int64_t sort) {
  const auto take = [&sort](int choices) {
    const int taken = int(sort % choices);
    sort /= choices;
    return taken;
  };
  Case c{};
  c.format = format;
  c.half = take(2);
  c.activation_bits = take(2) ? 8 : 16;
  c.scales = Scales(take(3));
  if (!c.of().zeros()) return c;
  if (c.of().base() < 0) c.is_signed = take(2);
  c.zero_points = ZeroPoints(take(3));
  return c;
}

// All sorts of all formats, each with some of the sizes.
std::vector<Case> products() {
  static const int64_t rows[] = {257, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 64, 65, 1, 1, 0};
  static const int64_t depths[] = {300, 1, 7, 129, 512, 33, 257, 64, 100, 8, 385};
  static const int64_t columns[] = {65, 1, 63, 64, 130, 2, 37};
  static const int64_t blocks[] = {16, 32, 48, 64, 100, 128, 256, 0};  // 0: K
  std::vector<Case> cases;
  for (int i = 0; i < kFormatCount * 3 * 72; ++i) {
    // 35 and the number of sorts share no factor: those of codes come three times each, those of tables 18 times.
    const int format = i % kFormatCount;
    if (kFormats[format].in_fields() && i / kFormatCount >= 3 * sorts_of(kFormats[format])) continue;
    Case c = sort_of(format, int64_t(i / kFormatCount) * 35 % sorts_of(kFormats[format]));
    const int64_t at = i / kFormatCount + i % kFormatCount * 5;  // formats go through the sizes at different paces
    c.m = rows[at % 24];
    c.k = depths[at % 11];
    c.n = columns[at % 7];
    c.block_size = blocks[(at + at / 8) % 8] ? blocks[(at + at / 8) % 8] : c.k;
    c.seed = uint64_t(i + 1);
    c.bias = i % 5 < 2;
    cases.push_back(c);
  }
  return cases;
}

// A scale that is no number makes its columns so, and no others.
void check_bad_scale(const Kernels* kernels, Report& report) {
  for (const float bad : {std::nanf(""), INFINITY}) {
    std::vector<uint8_t> codes(48 * 20, 0x97);  // of the first row of formats: numbers of 4 bits
    std::vector<float> scale(3 * 40, 0.5f), x(2 * 48, 1.0f), y(2 * 40, 7.0f);
    scale[40 + 11] = bad;
    const Source source = {codes.data(), scale.data(), false, nullptr, true};
    const PackedWeight packed(make_layout(48, 40, 16, 0, source), source, kernels);
    packed.multiply(x.data(), Element::kFloat, 2, y.data(), nullptr, PanelBits(packed.layout(), 8), serial());
    for (size_t i = 0; i < y.size(); ++i) {
      const float expected = i % 40 == 11 ? bad * -7 : 48 * 0.5f * (i % 2 ? -7.0f : 7.0f);
      const bool same = std::isnan(expected) ? std::isnan(y[i]) : y[i] == expected;
      if (!same) return report.fail("bad scale", "column " + std::to_string(i % 40) + " is " + std::to_string(y[i]));
    }
  }
}

// ---- one tile against the reference ----

struct TileData {
  TileData(const Layout& layout, int rows, int step)
      : codes(layout.padded_k() * rows), scale(rows / step * layout.groups()), sum(rows * layout.groups()) {}
  Guarded<int8_t> codes;
  Guarded<float> scale;
  Guarded<int32_t> sum;
};

void quantize_tile(const Kernels* kernels, const Layout& layout, const Guarded<float>& x, int rows, bool wide,
                   TileData& tile) {
  const int step = wide ? 2 : 1;
  for (int row = 0; row < rows; row += step) {
    Guarded<float> one(layout.k);
    std::memcpy(one.data(), x.data() + row / step * layout.k, size_t(layout.k) * 4);
    kernels->quantize(layout, one.data(), wide, row, rows, tile.codes.data(),
                      tile.scale.data() + row / step * layout.groups(), tile.sum.data() + row * layout.groups());
  }
}

template <typename T>
bool same(const Guarded<T>& a, const Guarded<T>& b) {
  return std::memcmp(a.data(), b.data(), size_t(a.size()) * sizeof(T)) == 0;
}

void check_tile(const Kernels* reference, const Kernels* kernels, const Case& c, int rows, bool wide, Report& report) {
  if (!kernels->products.of[c.format].multiply) return;
  Random random(c.seed + uint64_t(rows));
  const Weight weight(c, random);
  const Source source = weight.source();
  const Layout layout = make_layout(c.k, c.n, c.block_size, c.format, source);
  Guarded<uint8_t> packed(layout.bytes());
  pack(layout, source, packed.data());
  const int step = wide ? 2 : 1;
  Guarded<float> x(rows / step * c.k);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = activation(Row(i / c.k % int(Row::kNan)), i % c.k, random);

  TileData expected(layout, rows, step), tile(layout, rows, step);
  quantize_tile(reference, layout, x, rows, wide, expected);
  quantize_tile(kernels, layout, x, rows, wide, tile);
  const std::string where = c.text() + " tile of " + std::to_string(rows) + (wide ? " wide" : "");
  ++report.tiles;
  if (!same(expected.codes, tile.codes)) return report.fail(where, "codes of activations differ");
  if (!same(expected.scale, tile.scale)) return report.fail(where, "scales of activations differ");
  if (!same(expected.sum, tile.sum)) return report.fail(where, "sums of activations differ");

  if (sabotage == "activation" && report.tiles == 1) tile.codes[0] ^= 1;
  Guarded<float> out(rows / step * kPanel), wanted(rows / step * kPanel);
  const uint8_t* panel = packed.data() + (layout.panels() - 1) * layout.panel_bytes();
  const bool cold = random.below(2);  // not by the seed, whose parity a format may have in all of its cases
  const Tile reference_tile = {expected.codes.data(), expected.scale.data(), expected.sum.data(), rows, wide, cold};
  reference->products.of[c.format].multiply(layout, panel, reference_tile, wanted.data());
  const Tile own_tile = {tile.codes.data(), tile.scale.data(), tile.sum.data(), rows, wide, cold};
  kernels->products.of[c.format].multiply(layout, panel, own_tile, out.data());
  for (int row = 0; row < rows / step; ++row) {
    const float *a = out.data() + row * kPanel, *b = wanted.data() + row * kPanel, *in = x.data() + row * c.k;
    std::vector<double> error(kPanel);
    for (size_t n = 0; n < kPanel; ++n) error[n] = double(a[n]) - double(b[n]);
    const double usual = norm({in, in + c.k}) * norm(weight.w) / std::sqrt(double(c.k)), total = norm(error);
    const double relative = total == 0 ? 0 : total / std::fmax(usual, norm({b, b + kPanel}));
    report.error(relative, kLimitReference, report.worst_reference, where, "tile");
  }
}

void check_tiles(const Kernels* reference, const Kernels* kernels, Report& report) {
  for (const Case& c : products()) {
    if (c.seed > 72 * kFormatCount) break;
    const int most = kernels->products.of[c.format].rows;
    const int rows = most ? 1 + int(c.seed / kFormatCount % uint64_t(most)) : 0;
    check_tile(reference, kernels, c, rows, false, report);
    check_tile(reference, kernels, c, (rows + 1) / 2 * 2, true, report);
  }
}

// A NaN or an infinity is seen wherever in the row it stands.
void check_not_finite(const Kernels* kernels, Report& report) {
  const Layout layout = {93, 64, 48, 0, false, true};
  TileData tile(layout, 2, 2);
  Guarded<float> x(layout.k);
  for (const float bad : {std::nanf(""), -std::nanf(""), INFINITY, -INFINITY}) {
    for (int64_t at = 0; at < layout.k; ++at) {
      for (int64_t k = 0; k < layout.k; ++k) x[k] = k == at ? bad : float(k);
      for (const bool wide : {false, true}) {
        const float largest = kernels->quantize(layout, x.data(), wide, 0, 2, tile.codes.data(), tile.scale.data(),
                                                tile.sum.data());
        if (std::isfinite(largest)) report.fail("quantize", "not seen at " + std::to_string(at));
      }
    }
  }
}

// ---- fp16 ----

double half_value(uint16_t bits) {  // by definition
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// All numbers of fp16, what lies half way between neighbours, and one float beside that on both sides.
void check_half(const Kernels* kernels, Report& report) {
  std::vector<float> values;
  std::vector<uint16_t> expected;
  const auto add = [&](double value, uint16_t bits) {
    for (const uint16_t sign : {0, 0x8000}) {
      values.push_back(float(sign ? -value : value));
      expected.push_back(uint16_t(bits | sign));
    }
  };
  for (uint16_t bits = 0; bits < 0x7C00; ++bits) {
    const uint16_t next = uint16_t(bits + 1);  // 0x7C00, infinity, stands for 65536
    const float middle = float((half_value(bits) + half_value(next)) / 2);
    add(half_value(bits), bits);
    add(std::nextafterf(middle, 0.0f), bits);
    add(middle, bits & 1 ? next : bits);
    add(std::nextafterf(middle, INFINITY), next);
  }
  add(INFINITY, 0x7C00);
  add(1e-45, 0);
  add(3e38, 0x7C00);
  const int64_t count = int64_t(values.size());
  Guarded<float> in(count), back(count);
  Guarded<uint16_t> out(count);
  std::memcpy(in.data(), values.data(), values.size() * 4);
  kernels->to_half(in.data(), out.data(), count);
  kernels->from_half(out.data(), back.data(), count);
  report.conversions = int(count);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t wanted = expected[size_t(i)];
    if (out[i] != wanted) return report.fail("to_half", std::to_string(in[i]) + " becomes " + std::to_string(out[i]));
    const bool finite = (wanted & 0x7C00) != 0x7C00;
    const bool right = finite ? double(back[i]) == half_value(wanted) : std::isinf(back[i]);
    if (!right || std::signbit(back[i]) != (wanted >> 15)) {
      return report.fail("from_half", std::to_string(wanted) + " becomes " + std::to_string(back[i]));
    }
  }
  for (int64_t n = 0; n < 40; ++n) {  // every tail, NaN among them
    Guarded<float> some(n), again(n);
    Guarded<uint16_t> halves(n);
    for (int64_t i = 0; i < n; ++i) some[i] = i % 7 == 3 ? std::nanf("") : float(i);
    kernels->to_half(some.data(), halves.data(), n);
    kernels->from_half(halves.data(), again.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const bool right = i % 7 == 3 ? std::isnan(again[i]) : again[i] == some[i];
      if (!right) return report.fail("fp16", std::to_string(i) + " of " + std::to_string(n));
    }
  }
}

// Against float64, over every exponent and every tail; infinities have their sign and a NaN stays one.
void check_swiglu(const Kernels* kernels, Report& report) {
  std::vector<float> values = {0.0f, INFINITY, std::nanf("")};
  for (int exponent = -40; exponent < 8; ++exponent) {
    for (int step = 0; step < 16; ++step) values.push_back(std::ldexp(1.0f + float(step) / 16, exponent));
  }
  for (size_t i = 0, count = values.size(); i < count; ++i) values.push_back(-values[i]);
  for (int64_t n = 0; n <= int64_t(values.size()); n += n < 70 ? 1 : 97) {
    Guarded<float> gate(n), up(n), y(n);
    for (int64_t i = 0; i < n; ++i) {
      gate[i] = values[values.size() - 1 - size_t(i)];
      up[i] = i % 5 == 1 ? -3.0f : 0.75f;
    }
    kernels->swiglu(gate.data(), up.data(), y.data(), n);
    report.gates += int(n);
    for (int64_t i = 0; i < n; ++i) {
      const double x = gate[i], wanted = x / (1 + std::exp(-x)) * up[i];
      const bool right = std::isnan(x)   ? std::isnan(y[i])
                         : std::isinf(x) ? std::isinf(y[i]) && std::signbit(y[i]) == std::signbit(x * up[i])
                                         : std::fabs(y[i] - wanted) <= 5e-7 * std::fabs(wanted) + 1e-34;
      if (!right) return report.fail("swiglu", std::to_string(x) + " becomes " + std::to_string(y[i]));
    }
  }
}

// Against the matrix in float64, in blocks of all sizes; a NaN and an infinity stay in their block.
void check_hadamard(const Kernels* kernels, Report& report) {
  for (int64_t block : {16, 32, 64}) {
    const int64_t n = 5 * block, odd = 2 * block + 3;
    Guarded<float> x(n), signs(block), y(n);
    for (int64_t i = 0; i < n; ++i) x[i] = std::ldexp(float(i * 37 % 101) - 50.0f, int(i % 13) - 6);
    for (int64_t i = 0; i < block; ++i) signs[i] = i * i % 7 < 3 ? -0.125f : 0.125f;
    for (float special : {0.0f, INFINITY, std::nanf("")}) {
      x[odd] = special;
      kernels->hadamard(x.data(), signs.data(), y.data(), n, block);
      for (int64_t i = 0; i < n; ++i) {
        double wanted = 0, size = 0;
        for (int64_t j = 0; j < block; ++j) {
          const double term = double(x[i / block * block + j]) * signs[j];
          wanted += __builtin_parityll(uint64_t(i % block & j)) ? -term : term;
          size += std::fabs(term);
        }
        ++report.turns;
        const bool right = std::isfinite(wanted) ? std::fabs(y[i] - wanted) <= 1e-6 * size : !std::isfinite(y[i]);
        if (!right) return report.fail("hadamard", std::to_string(wanted) + " becomes " + std::to_string(y[i]));
      }
    }
  }
}

constexpr double kLimitAttention = 2e-5, kLimitHalfAttention = 3e-3;  // sums of up to 300 values near 1, and fp16 results

// Against float64, on one thread and several.
void check_attention(const Kernels* kernels, Report& report) {
  uint64_t seed = 0;
  for (const AttentionCase& own : attentions()) {
    for (const Parallel& parallel : {serial(), Parallel{run_threads, nullptr}}) {
      AttentionRun run(own, ++seed);
      run.keep();
      if (sabotage == "cache" && own.rows == 1) run.sabotage();
      run.run(kernels, parallel);
      ++report.attentions;
      const double limit = own.half ? kLimitHalfAttention : kLimitAttention, appended = own.type == CacheType::kFloat ? 0 : 0.51;
      if (!(run.worst_appended() <= appended)) report.fail(own.name(), "appended " + std::to_string(run.worst_appended()));
      report.error(run.worst_result() / limit, 1, report.worst_attention, own.name(), "result");
    }
  }
}

int check_kernels(const Kernels* reference, const Kernels* kernels) {
  Report report;
  if (sabotage == "guard") {
    Guarded<float> x(300);
    kernels->from_half(reinterpret_cast<const uint16_t*>(x.data() + 1), std::vector<float>(600).data(), 600);
  }
  check_half(kernels, report);
  check_swiglu(kernels, report);
  check_hadamard(kernels, report);
  check_attention(kernels, report);
  check_not_finite(kernels, report);
  check_tiles(reference, kernels, report);
  for (const Case& c : products()) check_product(kernels, c, report);
  check_bad_scale(kernels, report);
  std::printf("%-10s %d products: a16 %.1e (limit %.1e), of codes %.1e (%.0e); %d tiles: %.1e (%.0e); ", kernels->name,
              report.products, report.worst16, kLimit16, report.worst_codes, kLimitCodes, report.tiles,
              report.worst_reference, kLimitReference);
  std::printf("%d fp16, %d gates, %d turns, %d attentions: %.2f of the limit; %d failures\n", report.conversions, report.gates,
              report.turns, report.attentions, report.worst_attention, report.failures);
  std::fflush(stdout);
  return report.failures;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<const Kernels*> chosen;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--sabotage") == 0 && i + 1 < argc) {
      sabotage = argv[++i];
      continue;
    }
    chosen.push_back(named_kernels(argv[i]));
    if (!chosen.back()) {
      std::fprintf(stderr, "kernel_check: no kernels '%s' here; there are %s\n", argv[i], kernel_names());
      return 2;
    }
  }
  if (chosen.empty()) {
    for (const Kernels* const* entry = all_kernels(); *entry; ++entry) {
      if ((*entry)->available()) chosen.push_back(*entry);
    }
  }
  int failures = 0;
  for (const Kernels* kernels : chosen) failures += check_kernels(named_kernels("reference"), kernels);
  return failures ? 1 : 0;
}
