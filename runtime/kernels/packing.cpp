#include "packing.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"

namespace qcompile {
namespace {

uint8_t element(const uint8_t* codes, int bits, int64_t index) {
  if (bits == 8) return codes[index];
  return uint8_t((codes[index / 2] >> (4 * (index & 1))) & 15);
}

// Codes or zero points as the file has them.
struct Matrix {
  const uint8_t* codes;
  int64_t rows, n;
};

void read_fields(const Matrix& matrix, const Format& format, int64_t row, int64_t column, int count, uint8_t* out) {
  std::memset(out, 0, size_t(count));
  int64_t start = 0;
  for (int below = 0; below < format.bits;) {
    const int width = Format::widest_field(format.bits - below);
    const int64_t size = div_up(matrix.rows * width, 8);
    const uint8_t* in = matrix.codes + (start + row % size) * matrix.n + column;
    const int shift = width * int(row / size), mask = (1 << width) - 1;
    for (int i = 0; i < count; ++i) out[i] = uint8_t(out[i] | ((in[i] >> shift) & mask) << below);
    start += size;
    below += width;
  }
}

// `count` elements of a row from `column` on, one a byte; signed codes become unsigned by adding half the range.
void read_row(const Matrix& matrix, const Format& format, int64_t row, int64_t column, int count, bool is_signed,
              uint8_t* out) {
  if (format.in_fields()) return read_fields(matrix, format, row, column, count, out);
  const uint8_t* codes = matrix.codes;
  const int64_t index = row * matrix.n + column;
  const int bits = format.bits;
  const uint8_t flip = is_signed ? uint8_t(format.middle) : 0;  // in two's complement, adding it is flipping the top bit
  int i = 0;
  if (bits == 4 && index % 2 == 0) {
    const uint8_t* pairs = codes + index / 2;
    for (; i + 2 <= count; i += 2, ++pairs) {
      out[i] = uint8_t((*pairs & 15) ^ flip);
      out[i + 1] = uint8_t((*pairs >> 4) ^ flip);
    }
  }
  for (; i < count; ++i) out[i] = uint8_t(element(codes, bits, index + i) ^ flip);
}

// The number of an E4M3 byte; 0 for one that is none, as the table of the body has it.
float e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return 0.0f;
  const float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
  return byte & 128 ? -magnitude : magnitude;
}

float scale_at(const Format& format, const Source& source, int64_t index) {
  if (format.byte_scales()) {
    const uint8_t byte = static_cast<const uint8_t*>(source.scale)[index];
    const bool powers = format.scales == Stored::kPowers;
    const float scale = powers ? std::ldexp(1.0f, byte - 128) : std::ldexp(e4m3(byte), source.exponent);
    return (source.scale_is_half ? half_to_float(float_to_half(scale)) : scale) * float(format.levels_by());
  }
  if (source.scale_is_half) return half_to_float(static_cast<const uint16_t*>(source.scale)[index]);
  return static_cast<const float*>(source.scale)[index];
}

void pack_scales(const Layout& layout, const Source& source, int64_t group, int64_t column, int columns, uint8_t* out) {
  for (int c = 0; c < columns; ++c) {
    float scale = scale_at(layout.of(), source, group * layout.n + column + c);
    if (layout.half_scales) {
      uint16_t half = float_to_half(scale);
      std::memcpy(out + 2 * c, &half, 2);
    } else {
      std::memcpy(out + 4 * c, &scale, 4);
    }
  }
}

// rows: (unit_codes, 64) codes, one a byte -> one unit
void pack_fields(const Format& format, const uint8_t (*rows)[kPanel], uint8_t* unit) {
  std::memset(unit, 0, size_t(format.unit_bytes()));
  for (int r = 0; r < format.unit_codes(); ++r) {
    for_fields(format, r, [&](int byte, int shift, int below, int mask) {
      for (int column = 0; column < kPanel; ++column) {
        uint8_t& own = unit[byte + column_bytes(format, column)];
        own = uint8_t(own | ((rows[r][column] >> below) & mask) << shift);
      }
    });
  }
}

void pack_unit(const Format& format, const uint8_t (*rows)[kPanel], uint8_t* block) {
  if (format.in_fields()) return pack_fields(format, rows, block);
  for (int column = 0; column < kPanel; ++column) {
    for (int t = 0; t < 4; ++t) {
      uint8_t code = rows[t][column];
      if (format.bits == 4) code = uint8_t(code | (rows[t + 4][column] << 4));
      block[column * 4 + t] = code;
    }
  }
}

bool scales_fit_half(const Layout& layout, const Source& source, int64_t count) {
  if (source.scale_is_half && layout.of().levels_by() == 1) return true;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = scale_at(layout.of(), source, i);
    if (!(half_to_float(float_to_half(scale)) == scale)) return false;
  }
  return true;
}

bool has_zero_points(const Layout& layout, const Source& source, int64_t count) {
  if (!layout.of().zeros()) return false;
  // An absent one is 0, which is the middle only of signed codes; of fields it is the middle.
  if (!source.zero_point) return !source.is_signed && !layout.in_fields();
  const int middle = source.is_signed ? 0 : layout.of().middle;
  if (layout.in_fields()) {
    std::vector<uint8_t> row(size_t(layout.n));
    for (int64_t group = 0; group < layout.file_groups(); ++group) {
      read_fields({source.zero_point, layout.file_groups(), layout.n}, layout.of(), group, 0, int(layout.n), row.data());
      for (const uint8_t point : row) {
        if (point != middle) return true;
      }
    }
    return false;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (element(source.zero_point, layout.of().bits, i) != middle) return true;
  }
  return false;
}

}  // namespace

Layout make_layout(int64_t k, int64_t n, int64_t block_size, int format, const Source& source) {
  Layout layout(k, n, block_size, format, false, false);
  const int64_t count = layout.file_groups() * n;
  layout.zero_points = has_zero_points(layout, source, count);
  layout.half_scales = scales_fit_half(layout, source, count);
  return layout;
}

bool scales_are_finite(const Layout& layout, const Source& source) {
  for (int64_t i = 0, count = layout.file_groups() * layout.n; i < count; ++i) {
    if (!std::isfinite(scale_at(layout.of(), source, i))) return false;
  }
  return true;
}

void pack(const Layout& layout, const Source& source, uint8_t* packed) {
  const Format& format = layout.of();
  const int step = format.unit_codes();
  const Matrix codes = {source.codes, format.code_rows(layout.k), layout.n}, zero_points = {source.zero_point, layout.file_groups(), layout.n};
  uint8_t rows[32][kPanel];
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const int64_t column = panel * kPanel;
    const int columns = int(layout.n - column < kPanel ? layout.n - column : kPanel);
    for (int64_t group = 0; group < layout.groups(); ++group) {
      uint8_t* out = packed + panel * layout.panel_bytes() + group * layout.group_bytes();
      std::memset(out, 0, size_t(layout.scale_bytes() + layout.zero_point_bytes()));
      const int64_t file_group = group / layout.splits();
      pack_scales(layout, source, file_group, column, columns, out);
      out += layout.scale_bytes();
      if (layout.zero_points) {
        if (source.zero_point) {
          read_row(zero_points, layout.of(), file_group, column, columns, source.is_signed, out);
        }
        out += kPanel;
      }
      const int64_t begin = layout.group_begin(group) / format.shared(), filled = format.code_rows(layout.group_rows(group));
      for (int64_t row = 0; row < format.code_rows(layout.depth(group)); row += step, out += format.unit_bytes()) {
        std::memset(rows, 0, size_t(step) * kPanel);
        for (int t = 0; t < step && row + t < filled; ++t) {
          read_row(codes, format, begin + row + t, column, columns, source.is_signed, rows[t]);
        }
        pack_unit(format, rows, out);
      }
    }
  }
}

void unpack_column(const Layout& layout, const uint8_t* packed, int64_t column, float* w) {
  const int c = int(column % kPanel);
  for (int64_t group = 0; group < layout.groups(); ++group) {
    const uint8_t* in = packed + column / kPanel * layout.panel_bytes() + group * layout.group_bytes();
    float scale;
    if (layout.half_scales) {
      uint16_t half;
      std::memcpy(&half, in + 2 * c, 2);
      scale = half_to_float(half);
    } else {
      std::memcpy(&scale, in + 4 * c, 4);
    }
    in += layout.scale_bytes();
    const int zero_point = layout.zero_points ? in[c] : layout.of().middle;
    in += layout.zero_point_bytes();
    const int64_t begin = layout.group_begin(group);
    for (int64_t row = 0; row < layout.group_rows(group); ++row) {
      w[begin + row] = float(integer_at(layout, in, c, row) - zero_point) * scale;
    }
  }
}

}  // namespace qcompile
