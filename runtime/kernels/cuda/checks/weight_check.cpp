// DeviceWeight (weight.h) as a whole on a CPU: the runtime and cuBLAS are emulated (emulated/), the kernels run on the
// emulator. Products against float64, what is asked for as scratch, counters, failures.
//
//   weight_check [--sabotage x]     finds emulated/cublas.cpp as libcublas.so.13
//
// One line a part. Exit code 1 if anything failed. --sabotage x: one element of x is another one than float64 sees.
// What it cannot show: that anything is in order on a stream, or legal while a graph is captured.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../check_data.h"
#include "../counters.h"
#include "../cublas.h"
#include "../device.h"
#include "../emulator/emulated/runtime.h"
#include "../pack.h"
#include "../weight.h"

using namespace qcompile::cuda;
using check::Random;
using qcompile::Source;
using emulated::runtime;

namespace {

bool sabotage = false;

struct Report {
  const char* name;
  int cases = 0, failures = 0;
  double worst = 0;

  void expect(bool right, const std::string& what) {
    if (right || ++failures > 5) return;
    std::printf("  FAILED %s: %s\n", name, what.c_str());
  }
};

struct Case {
  int64_t m, k, n, block_size;
  int bits;
  Element element;
  bool bias;
  int route;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "m %d k %d n %d block %d bits %d element %d%s route %d", int(m), int(k), int(n),
                  int(block_size), bits, int(element), bias ? " bias" : "", route);
    return line;
  }
};

int width(Element element) { return element == Element::kFloat ? 4 : 2; }

float read(Element element, const uint8_t* data, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, data + i * width(element), size_t(width(element)));
  if (element == Element::kHalf) return half_number(uint16_t(bits));
  return as_float(element == Element::kBfloat16 ? bits << 16 : bits);
}

// The number that is stored: value in the type of the element.
float write(Element element, uint8_t* data, int64_t i, float value) {
  const uint32_t bits = element == Element::kHalf       ? half_bits(value)
                        : element == Element::kBfloat16 ? bfloat_bits(value)
                                                        : as_bits(value);
  std::memcpy(data + i * width(element), &bits, size_t(width(element)));
  return read(element, data, i);
}

// Memory of the emulated device.
class Device {
 public:
  explicit Device(int64_t bytes) {
    if (cudaMalloc(&memory_, size_t(bytes)) != cudaSuccess) std::abort();
  }
  ~Device() { cudaFree(memory_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  uint8_t* data() { return static_cast<uint8_t*>(memory_); }

 private:
  void* memory_ = nullptr;
};

// Scratch of one product, and how much of it was asked for.
class Arena {
 public:
  Call call(cudaStream_t stream) {
    return {stream, [this](size_t bytes) -> void* {
              total += bytes;
              pieces_.emplace_back(new Device(int64_t(bytes)));
              return pieces_.back()->data();
            }};
  }
  size_t total = 0;

 private:
  std::vector<std::unique_ptr<Device>> pieces_;
};

cudaStream_t stream_number(uintptr_t number) { return reinterpret_cast<cudaStream_t>(number * 256); }

// ---- A weight as the file has it: unsigned codes with zero points, and as numbers

struct File {
  explicit File(const Case& c, Random& random)
      : codes(size_t(c.k * c.n * c.bits + 7) / 8), scales(size_t(groups(c) * c.n * 4)),
        zeros(size_t(groups(c) * c.n * c.bits + 7) / 8), w(size_t(c.k * c.n)) {
    for (uint8_t& byte : codes) byte = uint8_t(random.bits());
    for (uint8_t& byte : zeros) byte = uint8_t(random.bits());
    for (int64_t i = 0; i < groups(c) * c.n; ++i) {
      write(c.element, scales.data(), i, float(0.01 + 0.1 * random.uniform()));
    }
    for (int64_t i = 0; i < c.k * c.n; ++i) {
      const int64_t group = i / c.n / c.block_size * c.n + i % c.n;
      const int difference = get(codes, c.bits, i) - get(zeros, c.bits, group);
      w[size_t(i)] = double(difference) * double(read(c.element, scales.data(), group));
    }
  }
  static int64_t groups(const Case& c) { return (c.k + c.block_size - 1) / c.block_size; }
  static int get(const std::vector<uint8_t>& bytes, int bits, int64_t i) {
    return bits == 8 ? bytes[size_t(i)] : bytes[size_t(i / 2)] >> (4 * (i % 2)) & 15;
  }
  Source source(Element element) const {
    return {codes.data(), scales.data(), element != Element::kFloat, zeros.data(), false};
  }

  std::vector<uint8_t> codes, scales, zeros;
  std::vector<double> w;  // (k, n)
};

// ---- Products

// Of a row's norm: two units in the last place. Rounded are x (kFloat), the dequantized weight (cuBLAS) and y.
double limit(Element element) { return element == Element::kBfloat16 ? 8e-3 : 1e-3; }

void check_row(const Case& c, const File& file, const std::vector<float>& x, const std::vector<float>& bias,
               int64_t row, const uint8_t* y, Report& report) {
  double error = 0, total = 0;
  for (int64_t n = 0; n < c.n; ++n) {
    double expected = c.bias ? double(bias[size_t(n)]) : 0;
    for (int64_t k = 0; k < c.k; ++k) expected += double(x[size_t(row * c.k + k)]) * file.w[size_t(k * c.n + n)];
    error += std::pow(double(read(c.element, y, row * c.n + n)) - expected, 2);
    total += expected * expected;
  }
  const double relative = std::sqrt(error / total);
  report.worst = std::isnan(relative) ? relative : std::fmax(report.worst, relative / limit(c.element));
  report.expect(relative <= limit(c.element),
                c.text() + ": row " + std::to_string(row) + " error " + std::to_string(relative));
}

void check_product(const Case& c, uint64_t seed, Report& report) {
  Random random(seed);
  const File file(c, random);
  const Layout layout = make_layout(c.k, c.n, c.block_size, c.bits, c.element);
  const DeviceWeight weight(layout, file.source(c.element));
  // now and then x begins where 16 bytes do not: it is copied, which scratch_bytes does not foresee
  const int64_t offset = seed % 5 == 4 ? 1 : 0;
  Device x((c.m * c.k + offset) * width(c.element)), y(c.m * c.n * width(c.element)), bias(c.n * width(c.element));
  uint8_t* const x_data = x.data() + offset * width(c.element);
  std::vector<float> values(size_t(c.m * c.k)), biases(size_t(c.n));
  const auto fill = [&](std::vector<float>& numbers, uint8_t* data) {
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = write(c.element, data, int64_t(i), float(random.normal()));
    }
  };
  fill(values, x_data);
  fill(biases, bias.data());
  if (sabotage) values[0] += 1;
  const size_t foreseen = weight.scratch_bytes(c.m, c.route);
  for (const uintptr_t stream : {1, 20 + int(seed % 20)}) {  // of which the counters last for eight
    Arena arena;
    weight.multiply(x_data, c.m, y.data(), c.bias ? bias.data() : nullptr, arena.call(stream_number(stream)), c.route);
    ++report.cases;
    for (int64_t row = 0; row < c.m; ++row) check_row(c, file, values, biases, row, y.data(), report);
    const size_t copied = offset && layout.takes_x_as_it_is() ? size_t(round_up(c.m * layout.padded_k * 2, 256)) : 0;
    report.expect(arena.total <= foreseen + copied, c.text() + ": more scratch than foreseen");
  }
}

void check_products(Report& report) {
  constexpr int64_t shapes[][4] = {{1, 128, 64, 64},  {5, 70, 13, 32},   {9, 192, 130, 192}, {3, 1600, 65, 128},
                                   {17, 100, 33, 16}, {33, 64, 200, 64}, {2, 3072, 70, 256}};
  uint64_t seed = 0;
  for (const auto& shape : shapes) {
    for (const Element element : {Element::kHalf, Element::kBfloat16, Element::kFloat}) {
      for (const int route : {0, 1, -1}) {
        ++seed;
        const int bits = seed % 3 ? 4 : 8;
        check_product({shape[0], shape[1], shape[2], shape[3], bits, element, seed % 2 == 0, route}, seed, report);
      }
    }
  }
}

// fp32 rows with NaN, infinities, zeros, and numbers far outside fp16: what float64 makes of them, in each column.
void check_specials(Report& report) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> specials[] = {{std::nanf("")}, {infinity}, {-infinity}, {infinity, -infinity}, {3e38f}, {}};
  constexpr double scales[] = {1, 1, 1, 1, 1e30, 1e-37};  // of the other elements of the row
  for (const int route : {0, 1}) {
    const Case c{6, 200, 70, 64, 4, Element::kFloat, false, route};
    Random random(7);
    const File file(c, random);
    const DeviceWeight weight(make_layout(c.k, c.n, c.block_size, c.bits, c.element), file.source(c.element));
    Device x(c.m * c.k * 4), y(c.m * c.n * 4);
    std::vector<float> values(size_t(c.m * c.k));
    for (int64_t i = 0; i < c.m * c.k; ++i) {
      const std::vector<float>& special = specials[i / c.k];
      const size_t at = size_t(i % c.k - 90);
      const float value = at < special.size() ? special[at] : float(random.normal() * scales[i / c.k]);
      values[size_t(i)] = write(c.element, x.data(), i, value);
    }
    Arena arena;
    weight.multiply(x.data(), c.m, y.data(), nullptr, arena.call(nullptr), route);
    for (int64_t i = 0; i < c.m * c.n; ++i, ++report.cases) {
      double expected = 0, magnitude = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const double term = double(values[size_t(i / c.n * c.k + k)]) * file.w[size_t(k * c.n + i % c.n)];
        expected += term;
        magnitude += std::fabs(term);
      }
      const double got = double(read(c.element, y.data(), i)), error = std::fabs(got - expected);
      const bool overflows = std::fabs(expected) > 3.39e38 && std::isinf(got) && got * expected > 0;
      const bool right = std::isnan(expected) ? std::isnan(got) : overflows || error <= 1e-3 * magnitude;
      report.expect(right, c.text() + ": element " + std::to_string(i) + " is " + std::to_string(got) + " for " +
                               std::to_string(expected));
    }
  }
}

// ---- Making weights

// What is on the device is what pack_blocks makes of all blocks, though the host has a slice of it at a time; from
// device memory as from the host.
void check_upload(Report& report) {
  const Case small{1, 200, 300, 64, 4, Element::kHalf, false, -1};
  const Case large{1, 2048, 98304, 64, 4, Element::kHalf, false, -1};
  for (const Case& c : {small, large}) {
    const Layout layout = make_layout(c.k, c.n, c.block_size, c.bits, c.element);
    std::vector<uint8_t> codes(size_t(c.k * c.n / 2)), scales(size_t(layout.scales_bytes()), 0x2a);
    uint32_t state = 1;
    for (uint8_t& byte : codes) byte = uint8_t((state = state * 1664525 + 1013904223) >> 24);
    Source source = {codes.data(), scales.data(), true, nullptr, true};
    Device on_device(int64_t(codes.size()));
    std::memcpy(on_device.data(), codes.data(), codes.size());
    if (c.n == small.n) source.codes = on_device.data();
    const int copies = runtime().copies;
    const auto before = runtime().allocations;
    const DeviceWeight weight(layout, source);
    report.expect(runtime().copies - copies == (c.n == small.n ? 4 : 6), "copies of " + c.text());
    std::vector<uint8_t> expected(size_t(layout.bytes()));
    uint8_t* const parts[3] = {expected.data(), expected.data() + layout.codes_bytes(),
                               expected.data() + layout.codes_bytes() + layout.scales_bytes()};
    source.codes = codes.data();
    pack_blocks(layout, source, 0, layout.blocks(), {parts[0], parts[1], parts[2]});
    for (const auto& [data, bytes] : runtime().allocations) {
      if (before.count(data)) continue;
      ++report.cases;
      const uint8_t* at = data;
      const int64_t sizes[3] = {layout.codes_bytes(), layout.scales_bytes(), layout.zeros_bytes()};
      for (int i = 0; i < 3; at += round_up(sizes[i], 256), ++i) {
        report.expect(std::memcmp(at, parts[i], size_t(sizes[i])) == 0, c.text() + ": part " + std::to_string(i));
      }
    }
  }
}

void check_failure(const char* words, Report& report, const std::function<void()>& does) {
  ++report.cases;
  const size_t allocations = runtime().allocations.size();
  try {
    does();
    report.expect(false, std::string("no failure: ") + words);
  } catch (const std::runtime_error& error) {
    report.expect(std::string(error.what()).find(words) != std::string::npos, error.what());
  }
  report.expect(runtime().allocations.size() == allocations, std::string("memory is left: ") + words);
}

void check_failures(Report& report) {
  Random random(1);
  const Case c{1, 128, 64, 64, 4, Element::kFloat, false, -1};
  File file(c, random);
  const Layout layout = make_layout(c.k, c.n, c.block_size, c.bits, c.element);
  const auto make = [&] { return DeviceWeight(layout, file.source(c.element)); };
  runtime().most_allocations = runtime().allocations.size();
  check_failure("cannot allocate a weight: out of memory", report, make);
  runtime().most_allocations = 1000;
  check_failure("too large", report, [&] {
    DeviceWeight(make_layout(int64_t(1) << 22, 1, 64, 4, Element::kHalf), file.source(Element::kHalf));
  });
  runtime().attributes[cudaDevAttrComputeCapabilityMajor] = 7;
  check_failure("older than sm_80", report, make);
  runtime().attributes[cudaDevAttrComputeCapabilityMajor] = 8;

  Device x(512), y(256);
  Arena arena;
  const DeviceWeight weight(layout, file.source(c.element));
  runtime().device = 1;
  check_failure("another device", report,
                [&] { weight.multiply(x.data(), 1, y.data(), nullptr, arena.call(nullptr)); });
  runtime().device = 0;
  check_failure("route 2 needs", report, [&] { weight.plan(1, 2); });
  weight.multiply(nullptr, 0, nullptr, nullptr, arena.call(nullptr));
  report.expect(weight.scratch_bytes(0) == 0 && arena.total == 0, "no rows need no scratch");

  // one scale beyond what times 15 is an fp16 number: no route may round weights to fp16
  report.expect(weight.plan(1, 1).route == Route::kDequantize, "scales that fit fp16");
  write(c.element, file.scales.data(), 7, 5000.0f);
  const DeviceWeight wide(layout, file.source(c.element));
  check_failure("route 1 needs cuBLAS", report, [&] { wide.plan(1, 1); });
}

}  // namespace

int main(int count, char** arguments) {
  sabotage = count == 3 && std::string(arguments[1]) == "--sabotage" && std::string(arguments[2]) == "x";
  Report products{"products"}, specials{"specials"}, upload{"upload"}, failures{"failures"};
  products.expect(device_count() == 2 && cublas_ready(0), "the emulated device and cuBLAS are not found");
  Counters& counters = Counters::of_device(0);
  products.expect(counters.prepare() == cudaSuccess, "counters");
  for (int i = 8; i < Counters::kBuffers; ++i) counters.of_stream(stream_number(uintptr_t(100 + i)), 1);  // taken
  const int clears = runtime().clears;
  check_products(products);
  products.expect(runtime().clears > clears, "counters of an unknown stream are cleared");
  check_specials(specials);
  check_upload(upload);
  check_failures(failures);
  int failed = 0;
  for (const Report& report : {products, specials, upload, failures}) {
    std::printf("%s %d cases %d failures, worst error %.2f of its limit\n", report.name, report.cases, report.failures,
                report.worst);
    failed += report.failures;
  }
  return failed ? 1 : 0;
}
