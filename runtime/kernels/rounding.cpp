#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

// One source for every instruction set: the loader takes the form that the machine runs. Where the compiler cannot, the
// plain one.
#if defined(QCOMPILE_X86) && defined(__GLIBC__) && !defined(QCOMPILE_SANITIZED) && __has_attribute(target_clones)
#define FOR_EACH_MACHINE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EACH_MACHINE
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;
typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr float kLeastScale = 0x1p-120f;       // affine.LEAST_SCALE
constexpr float kLeastHalf = 0x1p-24f;         // the smallest fp16 number
constexpr float kDenseFrom = 0x1p-16f, kDenseTo = 65504;  // fp16 is dense enough for a scale between these
constexpr float kToInteger = 0x1.8p23f;        // added and taken away, it leaves a small number rounded to an integer

INLINE V all(float x) { return V{} + x; }
INLINE V bits(I x) { V y; std::memcpy(&y, &x, sizeof y); return y; }
INLINE I bits(V x) { I y; std::memcpy(&y, &x, sizeof y); return y; }
INLINE V least(V a, V b) { return a < b ? a : b; }
INLINE V most(V a, V b) { return a > b ? a : b; }
INLINE V magnitude(V x) { return bits(bits(x) & 0x7FFFFFFF); }
INLINE V with_sign(V x, V sign) { return bits((bits(x) & 0x7FFFFFFF) | (bits(sign) & I(I{} + INT32_MIN))); }

INLINE V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
INLINE void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
// Of the last columns there are fewer.
INLINE V load(const float* p, int lanes, float others) {
  if (lanes == kLanes) return load(p);
  V x = all(others);
  for (int i = 0; i < lanes; ++i) x[i] = p[i];
  return x;
}
INLINE void store(float* p, V x, int lanes) {
  if (lanes == kLanes) return store(p, x);
  for (int i = 0; i < lanes; ++i) p[i] = x[i];
}

// The nearest integer, ties to even, of numbers whose ends are integers far below 2^22: first cut, then rounded.
INLINE V cut(V x, V low, V high) { return (most(least(x, high), low) + kToInteger) - kToInteger; }

// The nearest fp16 number, as fp32.
INLINE V to_half(V x) {
  const V size = magnitude(x);
  const I whole = bits(size);
  const V normal = bits((whole + 0xFFF + ((whole >> 13) & 1)) & ~0x1FFF), subnormal = (size + 0.5f) - 0.5f;
  const V rounded = size < 0x1p-14f ? subnormal : normal;
  return with_sign(rounded > kDenseTo ? all(INFINITY) : rounded, x);
}

// What fp16 numbers are in fp32: their bits are those of a number 2^112 times smaller, or of what is not finite there.
INLINE V from_half(Halves x) {
  const I whole = __builtin_convertvector(x, I);
  const V size = bits((whole & 0x7FFF) << 13) * 0x1p112f;
  return bits((size < 0x1p16f ? bits(size) : bits(size) | bits(all(INFINITY))) | ((whole & 0x8000) << 16));
}

INLINE V load(const uint16_t* p, int lanes) {
  Halves x{};
  if (lanes == kLanes) {
    std::memcpy(&x, p, sizeof x);
  } else {
    std::memcpy(&x, p, size_t(lanes) * sizeof *p);
  }
  return from_half(x);
}
INLINE V load(const float* p, int lanes) { return load(p, lanes, 0); }

INLINE I exponent(V x) { return (bits(magnitude(x)) >> 23) - 127; }
INLINE V power(I exponent) { return bits((exponent + 127) << 23); }

// formats.mxfp4: 2^floor(log2(1.5 s)).
INLINE V nearby_power(const QCompileGrid& grid, V scale) {
  I own = exponent(scale * 1.5f);
  own = own < grid.least ? I{} + grid.least : own;
  own = own > grid.most ? I{} + grid.most : own;
  return scale == 0 ? all(1) : power(own);
}

// formats.nvfp4: the nearest E4M3 number, three bits of mantissa from 2^-6 on, times 2^exponent.
INLINE V e4m3(const QCompileGrid& grid, V scale) {
  const V unit = power(I{} + grid.least);
  const V size = most(least(magnitude(scale) / unit, all(448)), all(0x1p-9f));
  const I whole = bits(size);
  const V normal = bits((whole + 0x7FFFF + ((whole >> 20) & 1)) & ~0xFFFFF), subnormal = (size + 0x1.8p14f) - 0x1.8p14f;
  return scale == 0 ? unit : (size < 0x1p-6f ? subnormal : normal) * unit;
}

// Grid.storable
INLINE V storable(const QCompileGrid& grid, V scale) {
  if (grid.scales == kPowerScales) return nearby_power(grid, scale);
  if (grid.scales == kE4M3Scales) return e4m3(grid, scale);
  const bool half = grid.scales == kHalfScales;
  const V size = magnitude(scale);
  V stored = to_half(scale);
  if (!half) stored = ((size >= kDenseFrom) & (size <= kDenseTo)) ? stored : scale;
  const V smallest = all(half ? kLeastHalf : kLeastScale);
  stored = magnitude(stored) < smallest ? with_sign(smallest, scale) : stored;
  return scale == 0 ? all(1) : stored;
}

// 0, or NaN where a number is not finite: added to a scale, it stays, as it does in numpy. Comparisons lose NaN.
INLINE V fault(V x) { return x * 0.0f; }

INLINE void store_codes(uint8_t* p, V x, int lanes) {
  const Bytes codes = __builtin_convertvector(__builtin_convertvector(x, I), Bytes);
  if (lanes == kLanes) {
    std::memcpy(p, &codes, sizeof codes);
  } else {
    std::memcpy(p, &codes, size_t(lanes));
  }
}

INLINE I load_codes(const uint8_t* p, bool is_signed, int lanes) {
  typedef int8_t Signed __attribute__((vector_size(kLanes)));
  Bytes codes{};
  if (lanes == kLanes) {
    std::memcpy(&codes, p, sizeof codes);
  } else {
    std::memcpy(&codes, p, size_t(lanes));
  }
  return is_signed ? __builtin_convertvector(Signed(codes), I) : __builtin_convertvector(codes, I);
}

struct Range {
  V scale, zero;
};

// The level nearest to x, and its code. kTable: ties go to the lower one; of integers, to an even one.
struct Nearest {
  V level, code;
};

template <bool kTable>
INLINE Nearest nearest_level(const QCompileGrid& grid, V x, V zero) {
  if constexpr (kTable) {
    Nearest found{all(grid.level[0]), all(grid.code[0])};
#pragma GCC unroll 15
    for (int i = 0; i < 15; ++i) {
      const I above = x > grid.middle[i];
      found = {above ? all(grid.level[i + 1]) : found.level, above ? all(grid.code[i + 1]) : found.code};
    }
    return found;
  }
  const V level = cut(x, grid.qmin - zero, grid.qmax - zero);
  return {level, level + zero};
}

// Grid.span of a group's extremes, 0 among them.
INLINE Range span(const QCompileGrid& grid, V low, V high, float shrink) {
  low *= shrink;
  high *= shrink;
  if (grid.levels) return {storable(grid, most(high, -low) / grid.largest), V{}};
  if (!grid.is_signed) {
    const V scale = storable(grid, (high - low) / grid.qmax);
    return {scale, cut(-low / scale, all(grid.qmin), all(grid.qmax))};
  }
  if (grid.signed_scale) return {storable(grid, (high > -low ? high : low) / grid.qmin), V{}};
  return {storable(grid, most(high / grid.qmax, low / grid.qmin)), V{}};
}

struct Sums {
  V top, bottom, error;
};

// The error of rounding rows of `block` by a range, weighted; with `refit`, the sums of the best scale for their levels instead.
template <bool kTable, bool kRefit>
INLINE Sums sums(const QCompileGrid& grid, const V* block, const V* weight, int64_t rows, Range range) {
  Sums own{};
  for (int64_t row = 0; row < rows; ++row) {
    const V level = nearest_level<kTable>(grid, block[row] / range.scale, range.zero).level;
    if (kRefit) {
      const V weighted = level * weight[row];
      own.top += weighted * block[row];
      own.bottom += weighted * level;
    } else {
      const V residual = level * range.scale - block[row];
      own.error += (residual * weight[row]) * residual;
    }
  }
  return own;
}

template <bool kTable>
INLINE Range best_range(const QCompileGrid& grid, const V* block, const V* weight, int64_t rows, const float* shrinks,
                        int64_t count) {
  V low{}, high{}, faults{};
  for (int64_t row = 0; row < rows; ++row) {
    low = least(low, block[row]);
    high = most(high, block[row]);
    faults += fault(block[row]);
  }
  Range best = span(grid, low, high, 1);
  V error = sums<kTable, false>(grid, block, weight, rows, best).error;
  for (int64_t i = 0; i < count; ++i) {
    Range own = span(grid, low, high, shrinks[i]);
    const Sums found = sums<kTable, true>(grid, block, weight, rows, own);
    const V refit = found.top / found.bottom;
    const I usable = (found.bottom > 0) & (refit != 0) & (magnitude(refit) < INFINITY) & ((refit < 0) == (own.scale < 0));
    own.scale = storable(grid, usable ? refit : own.scale);
    const V left = sums<kTable, false>(grid, block, weight, rows, own).error;
    const I better = left < error;
    best = {better ? own.scale : best.scale, better ? own.zero : best.zero};
    error = better ? left : error;
  }
  best.scale += faults;
  return best;
}

// Rows of groups that need no memory of their own.
constexpr int64_t kRows = 256;

FOR_EACH_MACHINE
void fit(const QCompileGrid& grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t size, const float* importance,
         int64_t importance_ld, const float* shrinks, int64_t count, float* scale, float* zero_point) {
  alignas(64) float known[2 * kRows * kLanes];
  std::vector<float> large(size > kRows ? size_t((2 * size + 1) * kLanes) : 0);
  float* room = known;
  if (!large.empty()) room = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(large.data()) + 63) & ~uintptr_t(63));
  V* block = reinterpret_cast<V*>(room);
  V* weight = block + std::max(size, kRows);
  for (int64_t start = 0, group = 0; start < k; start += size, ++group) {
    const int64_t rows = std::min(size, k - start);
    for (int64_t column = 0; column < n; column += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, n - column));
      for (int64_t row = 0; row < rows; ++row) {
        block[row] = load(w + (start + row) * ld + column, lanes, 0);
        const float* own = importance + (start + row) * (importance_ld ? importance_ld : 1);
        weight[row] = importance_ld ? load(own + column, lanes, 0) : all(*own);
      }
      const Range best = grid.levels ? best_range<true>(grid, block, weight, rows, shrinks, count)
                                     : best_range<false>(grid, block, weight, rows, shrinks, count);
      store(scale + group * n + column, best.scale, lanes);
      store(zero_point + group * n + column, best.zero, lanes);
    }
  }
}

// Columns of a group that are looked at together: whole cache lines of every row.
constexpr int kWide = 4;

template <bool kTable, typename Number, bool kFull>
INLINE void round_group(const QCompileGrid& grid, const Number* w, int64_t ld, int64_t rows, int64_t columns, float* scale,
                        float* zero_point, uint8_t* codes, int64_t ld_codes) {
  V low[kWide] = {}, high[kWide] = {}, faults[kWide] = {};
  Range range[kWide];
  const auto lanes = [columns](int part) {
    return kFull ? kLanes : int(std::max<int64_t>(0, std::min<int64_t>(kLanes, columns - part * kLanes)));
  };
  for (int64_t row = 0; row < rows; ++row) {
    for (int part = 0; part < kWide; ++part) {
      const V own = load(w + row * ld + part * kLanes, lanes(part));
      low[part] = least(low[part], own);
      high[part] = most(high[part], own);
      faults[part] += fault(own);
    }
  }
  for (int part = 0; part < kWide; ++part) {
    range[part] = span(grid, low[part], high[part], 1);
    range[part].scale += faults[part];
    store(scale + part * kLanes, range[part].scale, lanes(part));
    store(zero_point + part * kLanes, range[part].zero, lanes(part));
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int part = 0; part < kWide; ++part) {
      const V own = load(w + row * ld + part * kLanes, lanes(part)) / range[part].scale;
      const V code = nearest_level<kTable>(grid, own, range[part].zero).code;
      store_codes(codes + row * ld_codes + part * kLanes, code, lanes(part));
    }
  }
}

template <bool kTable, typename Number>
INLINE void nearest(const QCompileGrid& grid, const Number* w, int64_t ld, int64_t k, int64_t n, int64_t size, float* scale,
                    float* zero_point, int64_t ld_scale, uint8_t* codes, int64_t ld_codes) {
  for (int64_t start = 0, group = 0; start < k; start += size, ++group) {
    for (int64_t column = 0; column < n; column += kWide * kLanes) {
      const int64_t at = group * ld_scale + column;
      const int64_t rows = std::min(size, k - start), left = n - column;
      const Number* own = w + start * ld + column;
      uint8_t* out = codes + start * ld_codes + column;
      if (left >= kWide * kLanes) {
        round_group<kTable, Number, true>(grid, own, ld, rows, left, scale + at, zero_point + at, out, ld_codes);
      } else {
        round_group<kTable, Number, false>(grid, own, ld, rows, left, scale + at, zero_point + at, out, ld_codes);
      }
    }
  }
}

template <bool kTable>
INLINE void nearest_of(const QCompileGrid& grid, const void* w, bool half, int64_t ld, int64_t k, int64_t n, int64_t size,
                       float* scale, float* zero_point, int64_t ld_scale, uint8_t* codes, int64_t ld_codes) {
  const auto rounded = [&](auto* own) __attribute__((always_inline)) {
    nearest<kTable>(grid, own, ld, k, n, size, scale, zero_point, ld_scale, codes, ld_codes);
  };
  half ? rounded(static_cast<const uint16_t*>(w)) : rounded(static_cast<const float*>(w));
}

FOR_EACH_MACHINE
void nearest_on(const QCompileGrid& grid, const void* w, bool half, int64_t ld, int64_t k, int64_t n, int64_t size, float* scale,
                float* zero_point, int64_t ld_scale, uint8_t* codes, int64_t ld_codes) {
  if (grid.levels) return nearest_of<true>(grid, w, half, ld, k, n, size, scale, zero_point, ld_scale, codes, ld_codes);
  nearest_of<false>(grid, w, half, ld, k, n, size, scale, zero_point, ld_scale, codes, ld_codes);
}

FOR_EACH_MACHINE
void decode(const QCompileGrid& grid, const uint8_t* codes, int64_t ld_codes, int64_t k, int64_t n, int64_t size,
            const float* scale, const float* zero_point, int64_t ld_scale, float* w) {
  float level[256] = {};
  for (int place = 0; place < grid.levels; ++place) level[uint8_t(grid.code[place])] = grid.level[place];
  for (int64_t row = 0; row < k; ++row) {
    const int64_t group = row / size * ld_scale;
    for (int64_t column = 0; column < n; column += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, n - column));
      const I code = load_codes(codes + row * ld_codes + column, grid.is_signed != 0, lanes);
      V own = __builtin_convertvector(code, V);
      if (grid.levels) {
        for (int i = 0; i < kLanes; ++i) own[i] = level[uint8_t(code[i])];
      }
      own = (own - load(zero_point + group + column, lanes, 0)) * load(scale + group + column, lanes, 1);
      store(w + row * n + column, own, lanes);
    }
  }
}

FOR_EACH_MACHINE
void widen(const uint16_t* halves, int64_t ld, int64_t k, int64_t n, float* w) {
  for (int64_t row = 0; row < k; ++row) {
    for (int64_t column = 0; column < n; column += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, n - column));
      store(w + row * n + column, load(halves + row * ld + column, lanes), lanes);
    }
  }
}

template <bool kTable>
INLINE void project_as(const QCompileGrid& grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t size,
                       const float* scale, const float* zero_point, uint8_t* codes) {
  for (int64_t row = 0; row < k; ++row) {
    const int64_t group = row / size * n;
    for (int64_t column = 0; column < n; column += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, n - column));
      const V own = load(w + row * ld + column, lanes, 0) / load(scale + group + column, lanes, 1);
      const V zero = load(zero_point + group + column, lanes, 0);
      store_codes(codes + row * n + column, nearest_level<kTable>(grid, own, zero).code, lanes);
    }
  }
}

FOR_EACH_MACHINE
void project(const QCompileGrid& grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t size, const float* scale,
             const float* zero_point, uint8_t* codes) {
  if (grid.levels) return project_as<true>(grid, w, ld, k, n, size, scale, zero_point, codes);
  project_as<false>(grid, w, ld, k, n, size, scale, zero_point, codes);
}

// Rows that are rounded one after another, so that what they leave stays in registers' reach.
constexpr int64_t kRun = 64;

template <bool kTable>
INLINE void sweep_as(const QCompileGrid& grid, int64_t start, int64_t stop, int64_t n, int64_t size, const int64_t* order,
                     const float* lower, int64_t ld_lower, const float* energy, int64_t energy_ld, const float* w,
                     const float* scale, const float* zero_point, uint8_t* codes, float* left, float* spread) {
  for (int64_t column = 0; column < n; column += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, n - column));
    V known[kRun];
    for (int64_t i = stop - 1; i >= start; --i) {
      const int64_t row = order[i], group = row / size;
      V carried{};
      for (int64_t j = i + 1; j < stop; ++j) carried += lower[j * ld_lower + i] * known[j - start];
      carried += load(spread + i * n + column, lanes, 0);
      const V own = load(w + row * n + column, lanes, 0);
      const V by = energy_ld ? load(energy + i * energy_ld + column, lanes, 1) : all(energy[i]);
      const V unit = lower[i * ld_lower + i] * by, wish = own + carried / unit;
      const V step = load(scale + group * n + column, lanes, 1), zero = load(zero_point + group * n + column, lanes, 0);
      const Nearest found = nearest_level<kTable>(grid, wish / step, zero);
      const V decoded = found.level * step;
      known[i - start] = by * (own - decoded);
      store(left + i * n + column, known[i - start], lanes);
      store(spread + i * n + column, unit * (wish - decoded), lanes);
      store_codes(codes + row * n + column, found.code, lanes);
    }
  }
}

FOR_EACH_MACHINE
void sweep(const QCompileGrid& grid, int64_t start, int64_t stop, int64_t n, int64_t size, const int64_t* order,
           const float* lower, int64_t ld_lower, const float* energy, int64_t energy_ld, const float* w, const float* scale,
           const float* zero_point, uint8_t* codes, float* left, float* spread) {
  const auto rounded = [&](auto table) __attribute__((always_inline)) {
    sweep_as<decltype(table)::value>(grid, start, stop, n, size, order, lower, ld_lower, energy, energy_ld, w, scale, zero_point,
                                     codes, left, spread);
  };
  grid.levels ? rounded(std::true_type()) : rounded(std::false_type());
}

template <bool kTable>
INLINE void recode_as(const QCompileGrid& grid, int64_t count, int64_t n, const float* gram, int64_t ld_gram,
                      const float* added, const float* pull, const float* scale, const float* zero_point, float* levels,
                      float* change) {
  for (int64_t column = 0; column < n; column += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, n - column));
    const V step = load(scale + column, lanes, 1), zero = load(zero_point + column, lanes, 0);
    V known[kRun];
    for (int64_t i = 0; i < count; ++i) {
      V met{};
      for (int64_t j = 0; j < i; ++j) met += gram[i * ld_gram + j] * known[j];
      const V wanted = load(pull + i * n + column, lanes, 0) - met, level = load(levels + i * n + column, lanes, 0);
      const V wish = level + wanted / ((gram[i * ld_gram + i] + added[i]) * step);
      const V better = nearest_level<kTable>(grid, wish, zero).level;
      known[i] = (better - level) * step;
      store(levels + i * n + column, better, lanes);
      store(change + i * n + column, known[i], lanes);
    }
  }
}

FOR_EACH_MACHINE
void recode(const QCompileGrid& grid, int64_t count, int64_t n, const float* gram, int64_t ld_gram, const float* added,
            const float* pull, const float* scale, const float* zero_point, float* levels, float* change) {
  if (grid.levels) return recode_as<true>(grid, count, n, gram, ld_gram, added, pull, scale, zero_point, levels, change);
  recode_as<false>(grid, count, n, gram, ld_gram, added, pull, scale, zero_point, levels, change);
}

FOR_EACH_MACHINE
void rescale(const QCompileGrid& grid, int64_t total, int64_t first, int64_t count, int64_t n, const float* levels,
             const float* product, float* pull, float* scale, float* change) {
  for (int64_t column = 0; column < n; column += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, n - column));
    V power{}, gain{};
    for (int64_t row = 0; row < count; ++row) {
      const V level = load(levels + row * n + column, lanes, 0);
      power += level * load(product + (first + row) * n + column, lanes, 0);
      gain += level * load(pull + (first + row) * n + column, lanes, 0);
    }
    const V own = load(scale + column, lanes, 1), wish = own + (power > 0 ? gain / power : V{});
    const bool positive = !grid.is_signed || !grid.signed_scale;
    const I usable = (magnitude(wish) < INFINITY) & (positive ? wish > 0 : wish != 0);
    V step = storable(grid, usable ? wish : own) - own;
    step = step * (step * power - 2 * gain) < 0 ? step : V{};
    store(scale + column, own + step, lanes);
    for (int64_t row = 0; row < total; ++row) {
      float* at = pull + row * n + column;
      store(at, load(at, lanes, 0) - step * load(product + row * n + column, lanes, 0), lanes);
    }
    for (int64_t row = 0; row < count; ++row) {
      float* at = change + row * n + column;
      store(at, load(at, lanes, 0) + step * load(levels + row * n + column, lanes, 0), lanes);
    }
  }
}

}  // namespace

void qcompile_fit(const QCompileGrid* grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t rows,
                  const float* importance, int64_t importance_ld, const float* shrinks, int64_t count, float* scale,
                  float* zero_point) {
  fit(*grid, w, ld, k, n, rows, importance, importance_ld, shrinks, count, scale, zero_point);
}

void qcompile_nearest(const QCompileGrid* grid, const void* w, int64_t half, int64_t ld, int64_t k, int64_t n, int64_t rows,
                      float* scale, float* zero_point, int64_t ld_scale, uint8_t* codes, int64_t ld_codes) {
  nearest_on(*grid, w, half != 0, ld, k, n, rows, scale, zero_point, ld_scale, codes, ld_codes);
}

void qcompile_decode(const QCompileGrid* grid, const uint8_t* codes, int64_t ld_codes, int64_t k, int64_t n, int64_t rows,
                     const float* scale, const float* zero_point, int64_t ld_scale, float* w) {
  decode(*grid, codes, ld_codes, k, n, rows, scale, zero_point, ld_scale, w);
}

void qcompile_widen(const uint16_t* halves, int64_t ld, int64_t k, int64_t n, float* w) { widen(halves, ld, k, n, w); }

void qcompile_project(const QCompileGrid* grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t rows,
                      const float* scale, const float* zero_point, uint8_t* codes) {
  project(*grid, w, ld, k, n, rows, scale, zero_point, codes);
}

void qcompile_sweep(const QCompileGrid* grid, int64_t start, int64_t stop, int64_t n, int64_t rows, const int64_t* order,
                    const float* lower, int64_t ld_lower, const float* energy, int64_t energy_ld, const float* w,
                    const float* scale, const float* zero_point, uint8_t* codes, float* left, float* spread) {
  sweep(*grid, start, stop, n, rows, order, lower, ld_lower, energy, energy_ld, w, scale, zero_point, codes, left, spread);
}

void qcompile_recode(const QCompileGrid* grid, int64_t count, int64_t n, const float* gram, int64_t ld_gram,
                     const float* added, const float* pull, const float* scale, const float* zero_point, float* levels,
                     float* change) {
  recode(*grid, count, n, gram, ld_gram, added, pull, scale, zero_point, levels, change);
}

void qcompile_rescale(const QCompileGrid* grid, int64_t all, int64_t first, int64_t count, int64_t n, const float* levels,
                      const float* product, float* pull, float* scale, float* change) {
  rescale(*grid, all, first, count, n, levels, product, pull, scale, change);
}
