// A product of cuda_check: a weight packed from a file's layout, x, bias, and y in float64 of exactly these numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../check_data.h"
#include "../device.h"
#include "../pack.h"

namespace qcompile::cuda {

struct Case {
  int64_t m, k, n, block_size;
  int bits;
  Element element;
  bool is_signed, zero_points, bias, large;
  int tokens, stages, split;
  uint64_t seed;

  int64_t file_groups() const { return (k + block_size - 1) / block_size; }
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line, "m %d k %d n %d block %d bits %d element %d %s%s%s%s tokens %d stages %d split %d",
                  int(m), int(k), int(n), int(block_size), bits, int(element), is_signed ? "signed" : "unsigned",
                  zero_points ? " zero points" : "", bias ? " bias" : "", large ? " large" : "", tokens, stages, split);
    return line;
  }
};

// What numbers of an element are in memory; kFloat as such.
struct Numbers {
  Element element;

  int width() const { return element == Element::kFloat ? 4 : 2; }
  float round(float value) const {
    if (element == Element::kFloat) return value;
    return element == Element::kHalf ? half_number(half_bits(value)) : bfloat_number(bfloat_bits(value));
  }
  void put(std::vector<uint8_t>& bytes, size_t index, float value) const {
    const uint32_t word = element == Element::kFloat  ? as_bits(value)
                          : element == Element::kHalf ? half_bits(value)
                                                      : bfloat_bits(value);
    std::memcpy(bytes.data() + index * size_t(width()), &word, size_t(width()));
  }
  float get(const uint8_t* bytes, size_t index) const {
    uint32_t word = 0;
    std::memcpy(&word, bytes + index * size_t(width()), size_t(width()));
    if (element == Element::kFloat) return as_float(word);
    return element == Element::kHalf ? half_number(uint16_t(word)) : bfloat_number(uint16_t(word));
  }
  // Half of the last place of a result, relative, and at least this much.
  double rounding() const {
    return std::ldexp(1.0, element == Element::kFloat ? -24 : element == Element::kHalf ? -11 : -8);
  }
  double smallest() const { return element == Element::kHalf ? std::ldexp(1.0, -25) : 1e-38; }
  double largest() const { return element == Element::kHalf ? 65504 : 3.3e38; }
};

// Vectors that kernels read 16 bytes at a time begin where memory is aligned so.
inline uint8_t* aligned(std::vector<uint8_t>& bytes, size_t size) {
  bytes.assign(size + 32, 0xa5);
  return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
}

struct CheckedProduct {
  Case c;
  Layout layout;
  Numbers numbers, operands;                      // of scales, bias and y; of x
  std::vector<uint8_t> memory[4];
  uint8_t *codes, *scales, *zeros, *x;            // packed weight; (m, padded_k)
  std::vector<uint8_t> bias;                      // (n,)
  std::vector<float> row_factor;                  // (m,)
  std::vector<double> y, magnitude;               // (m, n): the sum, and the sum of magnitudes

  explicit CheckedProduct(const Case& of)
      : c(of), layout(make_layout(c.k, c.n, c.block_size, c.bits, c.element)), numbers{c.element},
        operands{c.element == Element::kFloat ? Element::kHalf : c.element} {
    check::Random random(c.seed);
    const std::vector<double> w = weight(random);
    activations(random);
    multiply(w);
  }

  size_t x_bytes() const { return size_t(c.m * layout.padded_k) * 2; }

 private:
  // Codes and zero points as the file has them, scales, all packed; the numbers that they stand for, (k, n).
  std::vector<double> weight(check::Random& random) {
    const size_t count = size_t(c.k * c.n), groups = size_t(c.file_groups() * c.n);
    std::vector<uint8_t> file(count * size_t(c.bits) / 8 + 1), points(groups * size_t(c.bits) / 8 + 1);
    std::vector<uint8_t> scale(groups * size_t(numbers.width()));
    std::vector<int> point(groups, 0);
    std::vector<double> w(count);
    const int last = (1 << c.bits) - 1, middle = 1 << (c.bits - 1);
    for (size_t i = 0; i < groups; ++i) {
      const double size = (0.2 + random.uniform()) * (c.bits == 4 ? 0.002 : 0.000125) * (random.below(4) ? 1 : -1);
      numbers.put(scale, i, float(size));
      if (c.zero_points) point[i] = put_code(points, i, random.below(last + 1), middle);
    }
    for (size_t i = 0; i < count; ++i) {
      const int code = random.below(8) ? random.below(last + 1) : last * random.below(2);
      const size_t group = i / size_t(c.n) / size_t(c.block_size) * size_t(c.n) + i % size_t(c.n);
      w[i] = double(put_code(file, i, code, middle) - point[group]) * double(numbers.get(scale.data(), group));
    }
    codes = aligned(memory[0], size_t(layout.codes_bytes()));
    scales = aligned(memory[1], size_t(layout.scales_bytes()));
    zeros = aligned(memory[2], size_t(layout.zeros_bytes()));
    const Source source = {file.data(), scale.data(), numbers.width() == 2, c.zero_points ? points.data() : nullptr,
                           c.is_signed};
    pack_blocks(layout, source, 0, layout.blocks(), {codes, scales, zeros});
    return w;
  }

  // Puts a code into the file; returns its value.
  int put_code(std::vector<uint8_t>& file, size_t index, int code, int middle) const {
    if (c.bits == 8) file[index] = uint8_t(code);
    else file[index / 2] = uint8_t(file[index / 2] | code << (4 * (index % 2)));
    return c.is_signed && code >= middle ? code - 2 * middle : code;
  }

  // x where the packed weight has its rows; something finite where it is filled up, for there n - z is 0.
  void activations(check::Random& random) {
    x = aligned(memory[3], x_bytes());
    bias.resize(size_t(c.n) * size_t(numbers.width()));
    for (int64_t i = 0; i < c.n; ++i) numbers.put(bias, size_t(i), float(random.normal()));
    std::vector<uint8_t> bytes(x_bytes());
    for (size_t i = 0; i < size_t(c.m * layout.padded_k); ++i) {
      const double number = random.normal() * (random.below(50) ? 1 : 20);
      operands.put(bytes, i, float(c.large ? (random.below(2) ? 60000 : -60000) * random.uniform() : number));
    }
    std::memcpy(x, bytes.data(), bytes.size());
    for (int64_t i = 0; i < c.m; ++i) row_factor.push_back(std::ldexp(1.0f, int(i % 9) - 4));
  }

  void multiply(const std::vector<double>& w) {
    y.assign(size_t(c.m * c.n), 0);
    magnitude = y;
    for (int64_t m = 0; m < c.m; ++m) {
      double *sums = y.data() + m * c.n, *sizes = magnitude.data() + m * c.n;
      for (int64_t p = 0; p < layout.padded_k; ++p) {
        const int64_t k = source_row(layout, p);
        if (k < 0) continue;
        const double factor = c.element == Element::kFloat ? double(row_factor[size_t(m)]) : 1.0;
        const double number = factor * double(operands.get(x, size_t(m * layout.padded_k + p)));
        for (int64_t n = 0; n < c.n; ++n) {
          sums[n] += number * w[size_t(k * c.n + n)];
          sizes[n] += std::fabs(number * w[size_t(k * c.n + n)]);
        }
      }
      for (int64_t n = 0; c.bias && n < c.n; ++n) {
        sums[n] += double(numbers.get(bias.data(), size_t(n)));
        sizes[n] += std::fabs(double(numbers.get(bias.data(), size_t(n))));
      }
    }
  }
};

}  // namespace qcompile::cuda
