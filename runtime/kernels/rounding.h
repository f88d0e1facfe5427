// What a compile does with every row of a weight: the search of ranges, the rows of GPTQ's sweep and of coordinate descent.
//
// passes/native.py calls these instead of numpy, which takes a pass over memory for each step of the arithmetic; the clear
// form is passes/affine.py, passes/row_steps.py and passes/gptq.py. Matrices are fp32 in rows, `ld` numbers from one row to the
// next. Nothing allocates but a search for groups of many rows, and nothing fails. Products and sums are not contracted: each
// step rounds as numpy's does. Where a group holds a number that is not finite, its scale is found to be NaN.
#pragma once

#include "c_api.h"

// How a file holds scales: as fp32 or fp16 numbers; as powers of two; as E4M3 numbers times a power of two. A table's
// scales are positive.
enum QCompileScales : int32_t { kFloatScales, kHalfScales, kPowerScales, kE4M3Scales };

// A grid of integers: the smallest and the largest code. is_signed: a symmetric one, without zero points.
// signed_scale: scales of a symmetric grid may be negative.
// Or one of a table, with levels > 0 of the 16 places: `level` rises, `code` stands for it, and `middle` lies behind it, up to
// which a number goes to it; behind the last there is infinity. largest: of the magnitudes.
// least, most: exponents of powers; of E4M3 scales both are that of the tensor's.
struct QCompileGrid {
  float qmin, qmax;
  int32_t is_signed, signed_scale, scales, least, most, levels;
  float level[16], middle[16], code[16], largest;
};

// scale, zero_point (groups, n) of the fractions of each group's range (rows, n) that make the error least, weighted by
// importance (k, 1) or, where its ld is not 0, (k, n).
QCOMPILE_EXPORT void qcompile_fit(const QCompileGrid* grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t rows,
                                  const float* importance, int64_t importance_ld, const float* shrinks, int64_t count,
                                  float* scale, float* zero_point);

// scale, zero_point (groups, n) that span each group's range (rows, n), and the nearest codes (k, n; ld_codes) by them. w is fp16
// where `half`, else fp32.
QCOMPILE_EXPORT void qcompile_nearest(const QCompileGrid* grid, const void* w, int64_t half, int64_t ld, int64_t k, int64_t n,
                                      int64_t rows, float* scale, float* zero_point, int64_t ld_scale, uint8_t* codes,
                                      int64_t ld_codes);

// The nearest codes (k, n) of w by a scale and a zero point for each group.
QCOMPILE_EXPORT void qcompile_project(const QCompileGrid* grid, const float* w, int64_t ld, int64_t k, int64_t n, int64_t rows,
                                      const float* scale, const float* zero_point, uint8_t* codes);

// What codes (k, n; ld_codes) stand for by a scale and a zero point (groups, n; ld_scale) for each group, w (k, n).
QCOMPILE_EXPORT void qcompile_decode(const QCompileGrid* grid, const uint8_t* codes, int64_t ld_codes, int64_t k, int64_t n,
                                     int64_t rows, const float* scale, const float* zero_point, int64_t ld_scale, float* w);

// w (k, n), the fp16 numbers (k, n; ld) in fp32.
QCOMPILE_EXPORT void qcompile_widen(const uint16_t* halves, int64_t ld, int64_t k, int64_t n, float* w);

// Rounds rows start … stop - 1 of a sweep, the last first. order, lower (ld_lower), energy: as `Compensation` has them (scale);
// energy_ld 0: one for all columns. w, codes by row of the weight; left, spread by place in the order; all with ld n.
QCOMPILE_EXPORT void qcompile_sweep(const QCompileGrid* grid, int64_t start, int64_t stop, int64_t n, int64_t rows,
                                    const int64_t* order, const float* lower, int64_t ld_lower, const float* energy,
                                    int64_t energy_ld, const float* w, const float* scale, const float* zero_point,
                                    uint8_t* codes, float* left, float* spread);

// Sets the levels (count, n) of a run of rows of one group to their best values, one row after another: `change` is by how
// much each value (count, n) changes. gram (count, count) of these rows, with what is added to its diagonal; pull (count, n).
QCOMPILE_EXPORT void qcompile_recode(const QCompileGrid* grid, int64_t count, int64_t n, const float* gram, int64_t ld_gram,
                                     const float* added, const float* pull, const float* scale, const float* zero_point,
                                     float* levels, float* change);

// Sets the scale (n,) of a group to the best that the file can hold. product: G by the levels, (all, n), of which rows from
// `first` on are those of the group, (count, n). pull (all, n) follows; change (count, n) gets what the values change by.
QCOMPILE_EXPORT void qcompile_rescale(const QCompileGrid* grid, int64_t all, int64_t first, int64_t count, int64_t n,
                                      const float* levels, const float* product, float* pull, float* scale, float* change);
