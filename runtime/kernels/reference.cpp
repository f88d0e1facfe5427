// The arithmetic in plain C++: what every other instruction set must compute, integer for integer.

#include <cmath>
#include <cstring>
#include <utility>

#include "half.h"
#include "kernels.h"
#include "attention_tile.h"

namespace qcompile {
namespace {

bool always() { return true; }

// The largest |x|; a NaN or an infinity wins.
float largest(const float* x, int64_t count) {
  float best = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    if (!(magnitude <= best)) best = magnitude;
    if (std::isnan(best)) return best;
  }
  return best;
}

float quantize(const Layout& layout, const float* x, bool wide, int row, int rows, int8_t* codes, float* scale,
               int32_t* sum) {
  const float levels = wide ? 32512.0f : 127.0f;
  const int64_t groups = layout.groups(), depth = layout.depth();
  float row_largest = 0.0f;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = layout.group_begin(group), filled = layout.group_rows(group);
    const float amax = largest(x + begin, filled);
    if (!(amax <= row_largest)) row_largest = amax;
    if (!std::isfinite(amax)) return amax;  // the caller computes this row in floats
    const bool usable = amax >= kTiny;
    const float inverse = usable ? levels / amax : 0.0f;
    scale[group] = usable ? amax / levels : 0.0f;
    int32_t high_sum = 0, low_sum = 0;
    for (int64_t i = 0; i < layout.depth(group); ++i) {
      const int32_t q = i < filled ? int32_t(std::nearbyintf(x[begin + i] * inverse)) : 0;
      const int64_t k = group * depth + i;
      int8_t* out = codes + (k / 4 * rows + row) * 4 + k % 4;
      if (wide) {
        const int32_t high = (q + 128) >> 8, low = q - 256 * high;
        out[0] = int8_t(high);
        out[4] = int8_t(low);
        high_sum += high;
        low_sum += low;
      } else {
        out[0] = int8_t(q);
        high_sum += q;
      }
    }
    sum[group] = high_sum;
    if (wide) sum[groups + group] = low_sum;
  }
  return row_largest;
}

float group_scale(const Layout& layout, const uint8_t* group, int column) {
  if (layout.half_scales) {
    uint16_t half;
    std::memcpy(&half, group + 2 * column, 2);
    return half_to_float(half);
  }
  float value;
  std::memcpy(&value, group + 4 * column, 4);
  return value;
}

// Sum over one group of integer * activation, for one column and one int8 row.
int32_t dot(const Layout& layout, int64_t depth, const uint8_t* blocks, int column, const int8_t* codes, int rows) {
  int32_t total = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = layout.place(k);
    total += integer_at(layout, blocks, column, k) * codes[at / 4 * rows * 4 + at % 4];
  }
  return total;
}

void multiply(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  const int step = tile.wide ? 2 : 1, model_rows = tile.rows / step;
  const int64_t groups = layout.groups(), depth = layout.depth();
  std::memset(out, 0, sizeof(float) * size_t(model_rows) * kPanel);
  for (int64_t group = 0; group < groups; ++group, panel += layout.group_bytes()) {
    const uint8_t* zero_points = panel + layout.scale_bytes();
    const uint8_t* blocks = zero_points + layout.zero_point_bytes();
    for (int row = 0; row < model_rows; ++row) {
      const int8_t* codes = tile.codes + (group * depth / 4 * tile.rows + row * step) * 4;
      const int32_t* sum = tile.sum + row * step * groups + group;
      for (int column = 0; column < kPanel; ++column) {
        const int32_t zero_point = layout.zero_points ? zero_points[column] : layout.of().middle;
        int32_t total = dot(layout, layout.depth(group), blocks, column, codes, tile.rows) - zero_point * sum[0];
        if (tile.wide) {
          const int32_t low = dot(layout, layout.depth(group), blocks, column, codes + 4, tile.rows) - zero_point * sum[groups];
          total = total * 256 + low;
        }
        const float scale = group_scale(layout, panel, column);
        out[row * kPanel + column] += float(total) * scale * tile.scale[row * groups + group];
      }
    }
  }
}

// Code by code: what fields.h does by words.
void expand(const Layout& layout, const Layout& expanded, const uint8_t* panel, uint8_t* out) {
  const int64_t head = layout.scale_bytes() + layout.zero_point_bytes();
  const int more = layout.zero_points ? 0 : expanded.of().middle - layout.of().middle;
  std::memset(out, 0, size_t(expanded.panel_bytes()));
  for (int64_t group = 0; group < layout.groups(); ++group) {
    std::memcpy(out, panel, size_t(head));
    for (int64_t k = 0; k < layout.depth(group); ++k) {
      const int64_t row = layout.place(k);
      uint8_t* unit = out + head + row / expanded.of().unit_rows() * kBlockBytes;
      for_fields(expanded.of(), int(row % expanded.of().unit_rows()), [&](int byte, int shift, int, int) {
        for (int column = 0; column < kPanel; ++column) {
          uint8_t& own = unit[byte + column_bytes(expanded.of(), column)];
          own = uint8_t(own | (integer_at(layout, panel + head, column, k) + more) << shift);
        }
      });
    }
    panel += layout.group_bytes();
    out += expanded.group_bytes();
  }
}

void from_half(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = half_to_float(x[i]);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_to_half(x[i]);
}

// The same code for all formats.
template <int... kFormat>
constexpr Products products(std::integer_sequence<int, kFormat...>) {
  return {{(void(kFormat), Product{multiply, 4, 4})...}};
}

// ---- attention ----

struct AttentionSet {
  typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
  static constexpr auto from_half = qcompile::from_half;

  static Vector wide(const uint16_t* x) {
    float numbers[kLanes];
    from_half(x, numbers, kLanes);
    return Vector{numbers[0], numbers[1], numbers[2], numbers[3]};
  }
  static Vector wide(const int8_t* x) { return Vector{float(x[0]), float(x[1]), float(x[2]), float(x[3])}; }
  static Vector four(const Vector (&x)[4]) {
    const auto sum = [](const Vector& v) { return v[0] + v[1] + v[2] + v[3]; };
    return Vector{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])};
  }
  static Vector join(const Vector (&x)[1]) { return x[0]; }

  static void turn(const float* x, int64_t stride, float* y, int64_t y_stride) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) y[j * y_stride + i] = x[i * stride + j];
    }
  }
};

}  // namespace

extern const Kernels kReference;
const Kernels kReference = {
    "reference", always, quantize, products(std::make_integer_sequence<int, kFormatCount>()), kMostPairs, expand, from_half,
    to_half, swiglu, hadamard, Attend<AttentionSet>::run};

}  // namespace qcompile
