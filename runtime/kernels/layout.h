// The packed weight: the one owner of its layout. Everything here is plain arithmetic, the same on every machine.
//
// A weight (K, N) is cut into panels of 64 columns. A panel is one linear stream of groups, and a group is
//
//     scale       64 x fp16 (or fp32, where a scale of the weight is no fp16 number)
//     zero point  64 x u8, only where the weight has zero points (signed codes are stored with the format's middle added)
//     codes       blocks of 4 vectors of 64 bytes; vector j holds columns 16 j … 16 j + 15, four bytes a column
//
// 4 bits: a block covers 8 rows k; byte t of a column holds row t in its low nibble and row 4 + t in its high one. Codes
// stay codes: what looks them up in a table does so when it multiplies.
// 8 bits: a block covers 4 rows k; byte t of a column holds row t.
// Fields of bits: a unit of 4 to 32 rows of codes has, for each 16 columns in turn, the vectors of its fields, the highest
// bits first. A vector of a field of w bits covers 32 / w rows; row 8 p + 4 h + t lies in byte t of a column, from bit
// w p + 4 h on (row t, of 8 bits). So eight rows of any field are taken out by one shift and one mask, as those of 4 bits are.
// Pairs: a row of codes is two rows k. Four bytes of a column are looked up as the first numbers of four pairs, then as the
// second ones, so activations come in that order: of every eight, those of even rows k, then those of odd ones. Numbers that
// were looked up before lie in it, too, in blocks of 8 bits.
//
// So four bytes of a column meet four activations, which is the shape of the int8 dot-product instructions, and a panel
// is read front to back. A group of the file with more than 128 rows is stored as several packed groups of equal scale:
// activations then get a scale for each, and 32-bit sums cannot overflow. Rows that a packed group lacks (K or the
// group size is no multiple of 8, or of a unit) meet activations of value 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace qcompile {

constexpr int kPanel = 64;          // columns of a panel
constexpr int kVector = 64;         // bytes of a vector of codes
constexpr int kBlockBytes = 256;    // 4 vectors
constexpr int kMaxDepth = 128;      // rows of a packed group at most: 255 * 127 * 128 * 256 still fits 32 bits

QCOMPILE_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
QCOMPILE_INLINE int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Every division is done once, by the constructor: the sizes are asked for in each product.
struct Layout {
  int64_t k, n;        // of the weight
  int64_t block_size;  // rows of a group of the file
  int format;          // row of kFormats
  bool zero_points;    // u8 zero points in each group; otherwise the format's middle
  bool half_scales;    // fp16 scales, otherwise fp32

  QCOMPILE_INLINE Layout(int64_t k, int64_t n, int64_t block_size, int format, bool zero_points, bool half_scales)
      : k(k), n(n), block_size(block_size), format(format), zero_points(zero_points), half_scales(half_scales),
        unit_shift_(log2_of(kFormats[format].unit_rows())), unit_bytes_(kFormats[format].unit_bytes()),
        separated_(kFormats[format].pairs > 0), file_groups_(div_up(k, block_size)), splits_(div_up(block_size < k ? block_size : k, kMaxDepth)),
        rows_(round_up(div_up(block_size < k ? block_size : k, splits_), block_size < k ? 8 : 64)), depth_(padded(rows_)),
        groups_((file_groups_ - 1) * splits_ + div_up(k - (file_groups_ - 1) * block_size, rows_)),
        panels_(div_up(n, kPanel)), last_depth_(padded(group_rows(groups_ - 1))) {}

  // The same with codes brought into the blocks of the format's base: depths stay, and so does the order of rows.
  QCOMPILE_INLINE Layout expanded() const {
    Layout made = *this;
    made.format = of().base();
    made.unit_shift_ = log2_of(made.of().unit_rows());
    made.unit_bytes_ = made.of().unit_bytes();
    return made;
  }

  // Packed groups of one group of the file, and the rows of one with its padding; the last of all may be shorter.
  QCOMPILE_INLINE int64_t splits() const { return splits_; }
  QCOMPILE_INLINE int64_t depth() const { return depth_; }
  QCOMPILE_INLINE int64_t depth(int64_t g) const { return g + 1 < groups_ ? depth_ : last_depth_; }
  QCOMPILE_INLINE int64_t file_groups() const { return file_groups_; }
  QCOMPILE_INLINE int64_t groups() const { return groups_; }  // packed ones
  QCOMPILE_INLINE int64_t padded_k() const { return (groups_ - 1) * depth_ + last_depth_; }
  QCOMPILE_INLINE int64_t panels() const { return panels_; }

  QCOMPILE_INLINE int64_t scale_bytes() const { return kPanel * (half_scales ? 2 : 4); }
  QCOMPILE_INLINE int64_t zero_point_bytes() const { return zero_points ? kPanel : 0; }
  QCOMPILE_INLINE const Format& of() const { return kFormats[format]; }
  QCOMPILE_INLINE bool in_fields() const { return of().in_fields(); }
  // Whether rows k come in the order of pairs, and where that of a group stands.
  QCOMPILE_INLINE bool separated() const { return separated_; }
  QCOMPILE_INLINE int64_t place(int64_t k) const { return separated_ ? k / 8 * 8 + k % 2 * 4 + k % 8 / 2 : k; }
  QCOMPILE_INLINE int64_t units(int64_t depth) const { return depth >> unit_shift_; }
  QCOMPILE_INLINE int64_t code_bytes(int64_t depth) const { return units(depth) * unit_bytes_; }
  QCOMPILE_INLINE int64_t group_bytes() const { return scale_bytes() + zero_point_bytes() + code_bytes(depth_); }
  QCOMPILE_INLINE int64_t panel_bytes() const { return groups_ * group_bytes() - code_bytes(depth_ - last_depth_); }
  QCOMPILE_INLINE int64_t bytes() const { return panels_ * panel_bytes(); }

  // First row of packed group g, and how many rows of the weight it holds (0 where it is all padding).
  QCOMPILE_INLINE int64_t group_begin(int64_t g) const {
    return splits_ == 1 ? g * block_size : g / splits_ * block_size + g % splits_ * rows_;
  }
  QCOMPILE_INLINE int64_t group_rows(int64_t g) const {
    int64_t begin = group_begin(g), end = begin + rows_, last = (splits_ == 1 ? g + 1 : g / splits_ + 1) * block_size;
    if (end > last) end = last;
    if (end > k) end = k;
    return end > begin ? end - begin : 0;
  }

 private:
  QCOMPILE_INLINE int64_t padded(int64_t rows) const { return round_up(rows, unit_shift_ > 3 ? 1 << unit_shift_ : 8); }

  int unit_shift_, unit_bytes_;
  bool separated_;
  // rows_: of the weight in a packed group; depth_: with its padding.
  int64_t file_groups_, splits_, rows_, depth_, groups_, panels_, last_depth_;
};

// Bytes from the start of a unit to those of a column, less those of column 0.
QCOMPILE_INLINE int column_bytes(const Format& format, int column) {
  return column / 16 * (format.unit_bytes() / 4) + column % 16 * 4;
}

// put(bytes from the start of a unit, shift, bits below, mask) for each field of row r of a unit's codes, column 0. Bits
// `below` … of the code lie in that byte, from bit `shift` on.
template <typename Put>
QCOMPILE_INLINE void for_fields(const Format& format, int r, const Put& put) {
  for (int below = 0; below < format.bits;) {
    const int width = Format::widest_field(format.bits - below), rows = 4 * 8 / width;
    const int narrower = (format.bits - below - width) * format.unit_codes() / 32;  // vectors of the fields above
    put((narrower + r / rows) * kVector + r % 4, width == 8 ? 0 : width * (r % rows / 8) + 4 * (r / 4 % 2), below,
        (1 << width) - 1);
    below += width;
  }
}

// The code of row `row` of a group's codes and of a column of its panel.
QCOMPILE_INLINE int code_at(const Format& format, const uint8_t* codes, int column, int64_t row) {
  const uint8_t* unit = codes + row / format.unit_codes() * format.unit_bytes();
  int code = 0;
  for_fields(format, int(row % format.unit_codes()), [&](int byte, int shift, int below, int mask) {
    code |= ((unit[byte + column_bytes(format, column)] >> shift) & mask) << below;
  });
  return code;
}

// The integer of row k of a group that products multiply; `codes`: those of the group.
QCOMPILE_INLINE int integer_at(const Layout& layout, const uint8_t* codes, int column, int64_t k) {
  const Format& format = layout.of();
  if (!format.pairs) return format.integer(code_at(format, codes, column, layout.place(k)));
  return paired(format.pairs, code_at(format, codes, column, k / 2), int(k % 2)) + format.middle;
}

// Quantized activations of one tile: `rows` int8 rows next to each other, four k at a time: codes[k / 4][row][k % 4], k being
// `Layout::place` of a row.
// In the 16-bit mode every row of the model is two int8 rows, high byte then low byte, q = 256 * high + low.
struct Tile {
  const int8_t* codes;      // (padded_k / 4, rows, 4)
  const float* scale;       // (rows of the model, groups): amax / 127, or amax / 32512 in the 16-bit mode
  const int32_t* sum;       // (rows, groups): sum of the int8 codes of one group
  int rows;                 // int8 rows; even in the 16-bit mode
  bool wide;                // the 16-bit mode
  bool cold = false;        // the panel still lies in memory: worth prefetching
};

}  // namespace qcompile
