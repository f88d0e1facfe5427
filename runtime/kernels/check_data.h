// Inputs of kernel_check: memory that ends at a guard page, weights and activations of every kind, float64 products.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "half.h"
#include "packing.h"

namespace check {

// `count` elements, the last of which ends at a page that may not be touched.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
    poison();
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void poison() { std::memset(data_, 0xA5, size_t(count_) * sizeof(T)); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t count_;
  size_t mapped_;
  uint8_t* base_;
  T* data_;
};

// The same numbers on every machine, which std's distributions do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return uint32_t(state_ >> 32);
  }
  int below(int n) { return int(bits() % uint32_t(n)); }
  double uniform() { return (bits() + 0.5) / 4294967296.0; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

enum class Scales { kFloatOfHalf, kHalf, kFloat };   // fp32 that fit fp16; fp16; fp32 that do not; of bytes likewise
enum class ZeroPoints { kAbsent, kMiddle, kAny };
enum class Row { kPlain, kOutliers, kZero, kDenormal, kMixed, kHuge, kExtreme, kNan, kInf, kInfs, kCount };

constexpr bool is_finite(Row row) { return row < Row::kNan; }

struct Case {
  int64_t m, k, n, block_size;
  int format;
  bool is_signed, half, bias;
  Scales scales;
  ZeroPoints zero_points;
  int activation_bits;
  uint64_t seed;

  const qcompile::Format& of() const { return qcompile::kFormats[format]; }
  int64_t groups() const { return (k + block_size - 1) / block_size; }
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line, "m %lld k %lld n %lld block %lld %s %s %s scales %d zero points %d a%d%s",
                  (long long)m, (long long)k, (long long)n, (long long)block_size, of().word,
                  is_signed ? "signed" : "unsigned", half ? "fp16" : "fp32", int(scales), int(zero_points),
                  activation_bits, bias ? " bias" : "");
    return line;
  }
};

// A weight as the file has it, and what it means.
class Weight {
 public:
  Weight(const Case& c, Random& random)
      : codes_(bytes_of(c, c.k)), zero_points_(bytes_of(c, c.groups())),
        floats_(c.groups() * c.n), halves_(c.groups() * c.n), bytes_(c.groups() * c.n), w(size_t(c.k * c.n)),
        case_(c) {
    std::memset(codes_.data(), 0, size_t(codes_.size()));
    std::memset(zero_points_.data(), 0, size_t(zero_points_.size()));
    for (int64_t i = 0; i < floats_.size(); ++i) fill_group(i, random);
    saturated = random.below(8) == 0;
    for (int64_t k = 0; k < c.k; ++k) {
      for (int64_t n = 0; n < c.n; ++n) fill_code(k, n, saturated ? last() : random.below(last() + 1));
    }
  }

  qcompile::Source source() const {
    const bool half = case_.scales == Scales::kHalf;
    const void* scale = half ? static_cast<const void*>(halves_.data()) : floats_.data();
    return {codes_.data(), case_.of().byte_scales() ? bytes_.data() : scale, half,
            case_.zero_points == ZeroPoints::kAbsent ? nullptr : zero_points_.data(), case_.is_signed, exponent()};
  }

  // One code, one step off, in what `source` hands out; `w` keeps the old value.
  void sabotage() { codes_[codes_.size() / 2] ^= 1; }

 private:
  Guarded<uint8_t> codes_, zero_points_;
  Guarded<float> floats_;
  Guarded<uint16_t> halves_;
  Guarded<uint8_t> bytes_;

 public:
  std::vector<double> w;  // (K, N)
  bool saturated;         // all codes are the last: the largest sums there are

 private:
  int last() const { return (1 << case_.of().bits) - 1; }
  int middle() const { return case_.is_signed ? 0 : last() / 2 + 1; }
  int value(int code) const { return case_.is_signed && code > last() / 2 ? code - last() - 1 : code; }
  int level(int code) const { return case_.of().affine ? value(code) : case_.of().table[code] * case_.of().levels_by(); }

  int exponent() const { return case_.scales == Scales::kFloat ? -40 : -9; }
  bool fields() const { return case_.of().in_fields(); }
  static int64_t bytes_of(const Case& c, int64_t rows) {
    return !c.of().in_fields() ? (rows * c.n * c.of().bits + 7) / 8 : c.of().byte_rows(rows) * c.n;
  }

  // In fields of bits: put(byte, its bits, how many of them, the bits of the code below) for an element of so many rows.
  template <typename Put>
  void for_bytes(int64_t rows, int64_t index, const Put& put) const {
    const int64_t row = index / case_.n, column = index % case_.n;
    int64_t start = 0;
    for (int below = 0; below < case_.of().bits;) {
      const int width = qcompile::Format::widest_field(case_.of().bits - below);
      const int64_t size = (rows * width + 7) / 8;
      put((start + row % size) * case_.n + column, int(row / size) * width, width, below);
      start += size;
      below += width;
    }
  }

  void put(Guarded<uint8_t>& codes, int64_t rows, int64_t index, int code) {
    if (fields()) {
      for_bytes(rows, index, [&](int64_t byte, int shift, int width, int below) {
        codes[byte] = uint8_t(codes[byte] | ((code >> below) & ((1 << width) - 1)) << shift);
      });
    } else if (case_.of().bits == 8) {
      codes[index] = uint8_t(code);
    } else {
      codes[index / 2] = uint8_t(codes[index / 2] | code << (4 * (index & 1)));
    }
  }
  int get(const Guarded<uint8_t>& codes, int64_t rows, int64_t index) const {
    if (!fields()) return case_.of().bits == 8 ? codes[index] : codes[index / 2] >> (4 * (index & 1)) & 15;
    int code = 0;
    for_bytes(rows, index, [&](int64_t byte, int shift, int width, int below) {
      code |= ((codes[byte] >> shift) & ((1 << width) - 1)) << below;
    });
    return code;
  }

  void fill_group(int64_t index, Random& random) {
    float scale = float((0.2 + random.uniform()) * (random.below(4) ? 1 : -1) * 1.5 / case_.of().largest());
    if (case_.of().scales == qcompile::Stored::kE4M3) {
      // Those of 2^-40 have to stay fp32; 448 times 2^-9 is less than 1.
      bytes_[index] = uint8_t(random.below(127));
      const int bits = bytes_[index] >> 3, rest = bytes_[index] & 7;
      scale = float(std::ldexp(bits ? 8 + rest : rest, (bits ? bits : 1) - 10 + exponent()));
    } else if (case_.of().scales == qcompile::Stored::kPowers) {
      // 2^-24 is the least of fp16, 2^-25 and below become 0 there; what lies below 2^-30 has to stay fp32.
      const int first = case_.scales == Scales::kFloat ? 30 : 0, least = case_.scales == Scales::kHalf ? 26 : 24;
      bytes_[index] = uint8_t(128 - first - random.below(random.below(8) ? 4 : least + 1));
      scale = float(std::ldexp(1.0, bytes_[index] - 128));
    }
    halves_[index] = qcompile::float_to_half(scale);
    floats_[index] = case_.scales == Scales::kFloat ? scale : qcompile::half_to_float(halves_[index]);
    if (!case_.of().zeros()) return;
    put(zero_points_, case_.groups(), index, case_.zero_points == ZeroPoints::kAny ? random.below(last() + 1) : middle());
  }

  void fill_code(int64_t k, int64_t n, int code) {
    const int64_t index = k * case_.n + n, group = k / case_.block_size * case_.n + n;
    if (case_.of().pairs) {
      const int64_t rows = case_.of().code_rows(case_.k), at = k / 2 * case_.n + n;
      if (k % 2 == 0) put(codes_, rows, at, code);  // of both rows
      w[size_t(index)] = qcompile::paired(case_.of().pairs, get(codes_, rows, at), int(k % 2)) * double(floats_[group]);
      return;
    }
    put(codes_, case_.k, index, code);
    const int absent = fields() ? middle() : 0;
    const int zero_point =
        case_.zero_points == ZeroPoints::kAbsent ? absent : value(get(zero_points_, case_.groups(), group));
    w[size_t(index)] = double(level(code) - zero_point) * double(floats_[group]);
  }

  Case case_;
};

inline float activation(Row row, int64_t k, Random& random) {
  const float plain = float(random.normal());
  constexpr float inf = std::numeric_limits<float>::infinity();
  switch (row) {
    case Row::kOutliers: return k % 17 == 5 ? 20 * plain : plain;
    case Row::kZero: return random.below(2) ? 0.0f : -0.0f;
    case Row::kDenormal: return plain * 1e-40f;
    case Row::kMixed: return k % 256 < 128 ? plain : plain * 1e-35f;  // whole groups that count for zeros
    case Row::kHuge: return plain * 1e35f;
    case Row::kExtreme: return random.below(2) ? 32512.0f : 32384.0f;  // high bytes 127, low bytes 0 and -128
    case Row::kNan: return k == 3 ? std::nanf("") : plain;
    case Row::kInf: return k == 2 ? (random.below(2) ? inf : -inf) : plain;
    case Row::kInfs: return k % 5 == 1 ? (random.below(2) ? inf : -inf) : plain;
    default: return plain;
  }
}

// x (m, K), rows of all kinds, as floats and in the element type of the case; and a bias.
class Activations {
 public:
  Activations(const Case& c, Random& random)
      : values(size_t(c.m * c.k)), bias(size_t(c.n)), case_(c), elements_(c.m * c.k), halves_(c.m * c.k), bias_(c.n),
        half_bias_(c.n) {
    for (int64_t m = 0; m < c.m; ++m) {
      // Half of the rows are plain; a product of one row has each kind in its turn.
      kinds.push_back(random.below(2) ? Row::kPlain : Row(random.below(int(Row::kCount))));
      for (int64_t k = 0; k < c.k; ++k) set(m, k, activation(kinds.back(), k, random));
      for (int64_t k = 0; k < c.k; ++k) kinds.back() = std::isfinite(at(m, k)) ? kinds.back() : Row::kNan;
      if (kinds.back() >= Row::kNan && row_is_finite(m)) kinds.back() = Row::kPlain;  // too short to hold it
    }
    for (int64_t n = 0; n < c.n; ++n) {
      half_bias_[n] = qcompile::float_to_half(float(random.normal()));
      bias_[n] = qcompile::half_to_float(half_bias_[n]);
      bias[size_t(n)] = c.bias ? double(bias_[n]) : 0.0;
    }
  }

  float at(int64_t m, int64_t k) const { return values[size_t(m * case_.k + k)]; }
  const void* x() const { return case_.half ? static_cast<const void*>(halves_.data()) : elements_.data(); }
  const void* bias_elements() const {
    if (!case_.bias) return nullptr;
    return case_.half ? static_cast<const void*>(half_bias_.data()) : bias_.data();
  }
  void clear(int64_t m) {
    for (int64_t k = 0; k < case_.k; ++k) set(m, k, 0.0f);
  }

  std::vector<float> values;
  std::vector<double> bias;
  std::vector<Row> kinds;

 private:
  bool row_is_finite(int64_t m) const {
    for (int64_t k = 0; k < case_.k; ++k) {
      if (!std::isfinite(at(m, k))) return false;
    }
    return true;
  }
  void set(int64_t m, int64_t k, float value) {
    const int64_t index = m * case_.k + k;
    halves_[index] = qcompile::float_to_half(value);
    elements_[index] = value;
    values[size_t(index)] = case_.half ? qcompile::half_to_float(halves_[index]) : value;
  }

  Case case_;
  Guarded<float> elements_;
  Guarded<uint16_t> halves_;
  Guarded<float> bias_;
  Guarded<uint16_t> half_bias_;
};

// x as integer activations see it: amax / levels per row and packed group. Rows that the floats take stay as they are.
inline std::vector<double> quantized(const qcompile::Layout& layout, const float* x, float levels) {
  std::vector<double> seen(x, x + layout.k);
  float row_largest = 0;
  for (int64_t k = 0; k < layout.k; ++k) row_largest = std::fmax(row_largest, std::fabs(x[k]));
  if (row_largest < std::ldexp(1.0, -70)) return seen;
  for (int64_t group = 0; group < layout.groups(); ++group) {
    const int64_t begin = layout.group_begin(group), end = begin + layout.group_rows(group);
    float amax = 0;
    for (int64_t k = begin; k < end; ++k) amax = std::fmax(amax, std::fabs(x[k]));
    const float inverse = amax < std::ldexp(1.0, -100) ? 0.0f : levels / amax;
    for (int64_t k = begin; k < end; ++k) seen[size_t(k)] = std::nearbyint(x[k] * inverse) * (double(amax) / levels);
  }
  return seen;
}

// y (N,) = x (K,) W (K, N) + bias
inline std::vector<double> product(const std::vector<double>& x, const std::vector<double>& w,
                                   const std::vector<double>& bias) {
  std::vector<double> y = bias;
  for (size_t k = 0; k < x.size(); ++k) {
    for (size_t n = 0; n < y.size(); ++n) y[n] += x[k] * w[k * y.size() + n];
  }
  return y;
}

inline double norm(const std::vector<double>& v) {
  double total = 0;
  for (double value : v) total += value * value;
  return std::sqrt(total);
}

}  // namespace check
