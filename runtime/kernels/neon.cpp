// Arm NEON with the dot-product extension: sdot multiplies 16 signed codes by the four activations of one row, which it
// takes from a lane, and adds fours of products to 4 sums.
//
// Integers of a format that stay below 128 are signed bytes as they are. Of others, 128 is taken off: code ^ 128 is
// code - 128, tables hold levels less 128, and zero points lose 128, too.
// A tile is up to 4 int8 rows by 16 columns: 16 registers of sums, 8 of codes, 2 of activations, one mask of nibbles, one
// table of levels.

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "tiles.h"

namespace qcompile {
namespace {

constexpr int kTileRows = 4;
constexpr int kLanes = 4;                  // columns of a register of sums
constexpr int kCount = kVector / 16;       // registers of codes and of sums worked on at a time: 16 columns
constexpr int kAhead = 2048;               // bytes of prefetch

bool available() {
#if defined(__linux__)
  constexpr unsigned long asimd_dp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & asimd_dp) != 0;
#elif defined(__APPLE__)
  return true;  // every Apple processor of this architecture that runs macOS has it
#else
  return false;
#endif
}

// ---- activations ----

// x[0] … x[3], zeros from x[count] on; nothing behind x[count - 1] is read.
inline float32x4_t load_some(const float* x, int64_t count) {
  if (count >= kLanes) return vld1q_f32(x);
  float32x4_t v = vdupq_n_f32(0);
  if (count > 0) v = vld1q_lane_f32(x, v, 0);
  if (count > 1) v = vld1q_lane_f32(x + 1, v, 1);
  if (count > 2) v = vld1q_lane_f32(x + 2, v, 2);
  return v;
}

// The largest |x| by its bits, whose order puts NaN above infinity above every number.
inline float largest(const float* x, int64_t count) {
  uint32x4_t best = vdupq_n_u32(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const uint32x4_t bits = vreinterpretq_u32_f32(load_some(x + i, count - i));
    best = vmaxq_u32(best, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)));
  }
  const uint32_t bits = vmaxvq_u32(best);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The low byte of each.
inline void store_bytes(int32x4_t v, int8_t* out) {
  const int16x4_t words = vmovn_s32(v);
  const int32x2_t bytes = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words)));
  const int32_t four = vget_lane_s32(bytes, 0);
  __builtin_memcpy(out, &four, 4);
}

template <bool kWide>
inline void quantize_group(const float* x, int64_t filled, int64_t depth, float inverse, int rows, int8_t* out,
                           int32_t* sum, int32_t* low_sum) {
  int32x4_t high_sums = vdupq_n_s32(0), low_sums = high_sums;
  for (int64_t i = 0; i < depth; i += kLanes, out += 4 * rows) {
    const int32x4_t q = vcvtnq_s32_f32(vmulq_n_f32(load_some(x + i, filled - i), inverse));  // nearest, ties to even
    if (kWide) {
      const int32x4_t high = vshrq_n_s32(vaddq_s32(q, vdupq_n_s32(128)), 8), low = vsubq_s32(q, vshlq_n_s32(high, 8));
      high_sums = vaddq_s32(high_sums, high);
      low_sums = vaddq_s32(low_sums, low);
      store_bytes(high, out);
      store_bytes(low, out + 4);
    } else {
      high_sums = vaddq_s32(high_sums, q);
      store_bytes(q, out);
    }
  }
  *sum = vaddvq_s32(high_sums);
  if (kWide) *low_sum = vaddvq_s32(low_sums);
}

// ---- products ----

// Four activations of each row, row r in lane r; nothing behind the last row's is read.
template <int kRows>
inline int8x16_t load_activations(const int8_t* codes) {
  if (kRows == 4) return vld1q_s8(codes);
  if (kRows == 1) {
    int32_t four;
    __builtin_memcpy(&four, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  int32_t third = 0;
  if (kRows == 3) __builtin_memcpy(&third, codes + 8, 4);
  return vcombine_s8(vld1_s8(codes), vreinterpret_s8_s32(vdup_n_s32(third)));
}

// sums += codes of 4 rows k times the activations
template <int kRows>
inline void add_rows(const int8x16_t (&codes)[kCount], int8x16_t activations, int32x4_t (&sums)[kRows][kCount]) {
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    sums[0][j] = vdotq_laneq_s32(sums[0][j], codes[j], activations, 0);
    if constexpr (kRows > 1) sums[1][j] = vdotq_laneq_s32(sums[1][j], codes[j], activations, 1);
    if constexpr (kRows > 2) sums[2][j] = vdotq_laneq_s32(sums[2][j], codes[j], activations, 2);
    if constexpr (kRows > 3) sums[3][j] = vdotq_laneq_s32(sums[3][j], codes[j], activations, 3);
  }
}

// What is taken off the integers of a format to make them signed.
constexpr int shift_of(int format) { return kFormats[format].largest() > 127 ? 128 : 0; }

// The integers that products multiply, of a register that holds a code a byte.
template <int kFormat>
inline int8x16_t integers(uint8x16_t codes) {
  static constexpr Levels kLevelsOf = levels_of(kFormats[kFormat], shift_of(kFormat));
  if constexpr (!kFormats[kFormat].affine) return vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(kLevelsOf.of), codes));
  return vreinterpretq_s8_u8(shift_of(kFormat) ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
}

template <int kRows, int kFormat>
inline void add_block(const uint8_t* block, const int8_t* activations, int32x4_t (&sums)[kRows][kCount]) {
  constexpr bool nibbles = kFormats[kFormat].bits == 4;
  uint8x16_t loaded[kCount];
  int8x16_t codes[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    loaded[j] = vld1q_u8(block + 16 * j);
    codes[j] = integers<kFormat>(nibbles ? vandq_u8(loaded[j], vdupq_n_u8(15)) : loaded[j]);
  }
  add_rows<kRows>(codes, load_activations<kRows>(activations), sums);
  if (!nibbles) return;
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) codes[j] = integers<kFormat>(vshrq_n_u8(loaded[j], 4));
  add_rows<kRows>(codes, load_activations<kRows>(activations + 4 * kRows), sums);
}

// One packed group and what of a tile meets it.
struct Group {
  const uint8_t* scale;        // (64,) fp16 or fp32
  const uint8_t* zero_point;   // (64,), or nullptr
  const uint8_t* blocks;       // of codes
  const int8_t* activations;   // (depth / 4, rows, 4)
  const float* row_scale;      // of row 0 of the model; the next row's lie `groups` further
  const int32_t* sum;          // of int8 row 0, likewise
  int64_t groups;
};

// Sums of the 16 columns from `column` on start from minus the zero point's share.
template <int kRows, int kFormat>
inline void start(const Group& group, int column, int32x4_t (&sums)[kRows][kCount]) {
  constexpr int middle = kFormats[kFormat].middle, shift = shift_of(kFormat);
  int32x4_t zero_point[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) zero_point[j] = vdupq_n_s32(middle - shift);
  if (group.zero_point) {
    const uint8x16_t bytes = vld1q_u8(group.zero_point + column);
    const uint16x8_t first = vmovl_u8(vget_low_u8(bytes)), second = vmovl_high_u8(bytes);
    zero_point[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(first)));
    zero_point[1] = vreinterpretq_s32_u32(vmovl_high_u16(first));
    zero_point[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(second)));
    zero_point[3] = vreinterpretq_s32_u32(vmovl_high_u16(second));
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) zero_point[j] = vsubq_s32(zero_point[j], vdupq_n_s32(shift));
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) sums[r][j] = vmulq_n_s32(zero_point[j], -group.sum[r * group.groups]);
  }
}

inline float32x4_t load_scale(const Layout& layout, const uint8_t* scale, int column) {
  if (!layout.half_scales) return vreinterpretq_f32_u8(vld1q_u8(scale + 4 * column));
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scale + 2 * column)));
}

// out += sums, high and low row put together, times the scales of the weight and of the activations.
template <int kRows, bool kWide>
inline void finish(const Layout& layout, const Group& group, int column, const int32x4_t (&sums)[kRows][kCount],
                   float* out) {
  constexpr int step = kWide ? 2 : 1;
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    const float32x4_t scale = load_scale(layout, group.scale, column + kLanes * j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows / step; ++r) {
      int32x4_t total = sums[r * step][j];
      if (kWide) total = vaddq_s32(vshlq_n_s32(total, 8), sums[r * step + step - 1][j]);
      float* y = out + r * kPanel + column + kLanes * j;
      const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(total), scale);
      vst1q_f32(y, vfmaq_n_f32(vld1q_f32(y), scaled, group.row_scale[r * group.groups]));
    }
  }
}

template <int kRows, int kFormat, bool kWide>
void multiply_tile(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out) {
  constexpr int block_rows = kFormats[kFormat].block_rows();
  const int64_t groups = layout.groups(), depth = layout.depth();
  alignas(64) uint8_t expanded[kMaxDepth * kPanel];
  for (int i = 0; i < kRows / (kWide ? 2 : 1) * kPanel; i += kLanes) vst1q_f32(out + i, vdupq_n_f32(0));
  for (int64_t g = 0; g < groups; ++g, panel += layout.group_bytes()) {
    const int64_t blocks = layout.depth(g) / block_rows;
    const uint8_t* zero_point = panel + layout.scale_bytes();
    Group group = {panel, layout.zero_points ? zero_point : nullptr, zero_point + layout.zero_point_bytes(),
                         tile.codes + g * depth * kRows, tile.scale + g, tile.sum + g, groups};
    const bool cold = tile.cold && !layout.in_fields();
    if (layout.in_fields()) {
      expand_group(layout, group.blocks, layout.depth(g), tile.cold, expanded);
      group.blocks = expanded;
    }
    for (int column = 0; column < kPanel; column += kLanes * kCount) {
      int32x4_t sums[kRows][kCount];
      start<kRows, kFormat>(group, column, sums);
      const uint8_t* block = group.blocks + 4 * column;
      const int8_t* activations = group.activations;
      for (int64_t i = 0; i < blocks; ++i, block += kBlockBytes, activations += block_rows * kRows) {
        if (cold) __builtin_prefetch(block + kAhead);
        add_block<kRows, kFormat>(block, activations, sums);
      }
      finish<kRows, kWide>(layout, group, column, sums, out);
    }
  }
}

// ---- fp16 ----

void from_half(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
  for (; i < n; ++i) y[i] = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x[i]))), 0);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
  for (; i < n; ++i) y[i] = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x[i]))), 0);
}

// ---- attention ----

struct AttentionSet {
  typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 4;
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

extern const Kernels kNeon;
const Kernels kNeon = {"neon", available, quantize, kProducts<kTileRows>, 64, expand, from_half, to_half, swiglu, hadamard,
                      Attend<AttentionSet>::run};

}  // namespace qcompile
