// The table of instruction sets. Each entry computes the same integers; `reference` is the specification of the others.
#pragma once

#include "layout.h"

namespace qcompile {

// Groups of activations below 2^-100 are taken for zeros: 127 / amax must stay finite.
constexpr float kTiny = 7.88860905221011805e-31f;

// out (rows of the model, 64) = tile times one panel of packed weights.
struct Product {
  void (*multiply)(const Layout& layout, const uint8_t* panel, const Tile& tile, float* out);
  int rows;  // int8 rows of a tile at most; even, and kMaxRows at most
  int few;   // the same where the whole product has less than kManyRows
};

constexpr int kMaxRows = 32, kManyRows = 8;
constexpr int kMostPairs = 256;

// For each row of kFormats. nullptr: the instruction set has no product of that format, so no operator of it is
// registered, and its body runs.
struct Products {
  Product of[kFormatCount];
};

struct AttentionTile;

struct Kernels {
  const char* name;
  bool (*available)();

  // x (k,) -> one model row of a tile, written at int8 row `row` of `rows` (and row + 1 when wide).
  // codes, sum: as in Tile, of the whole tile; scale: (groups,) of this row; sum points at (groups,) of int8 row `row`,
  // the low row's follow it. Returns the largest |x|, or a NaN or infinity if x holds one.
  // A group whose largest |x| is below kTiny becomes zeros with scale 0.
  float (*quantize)(const Layout& layout, const float* x, bool wide, int row, int rows, int8_t* codes, float* scale,
                    int32_t* sum);

  Products products;

  // Larger codebooks are looked up when a weight is packed: a byte a weight is read in less time than it takes to look up.
  int pairs;

  // A panel of codes in fields of bits -> the same in the layout of the base, layout.expanded(). What products of few rows
  // do group by group, done once for many.
  void (*expand)(const Layout& layout, const Layout& expanded, const uint8_t* panel, uint8_t* out);

  void (*from_half)(const uint16_t* x, float* y, int64_t n);
  void (*to_half)(const float* x, uint16_t* y, int64_t n);

  // y = silu(gate) * up, each (n,): swiglu.h
  void (*swiglu)(const float* gate, const float* up, float* y, int64_t n);

  // Each block of x (n,), of 64, 32 or 16 numbers, times diag(signs) H: hadamard.h
  void (*hadamard)(const float* x, const float* signs, float* y, int64_t n, int64_t block);

  // attention.h, attention_tile.h
  void (*attend)(const AttentionTile& tile);
};

// nullptr-terminated, slowest first; entries that this build holds, available or not.
const Kernels* const* all_kernels();

// The entry of that name if this machine runs it, else nullptr.
const Kernels* named_kernels(const char* name);

// Names of the entries that this machine runs, slowest first, separated by commas.
const char* kernel_names();

// The fastest available entry, or the one that the environment variable QCOMPILE_KERNEL names (empty: the fastest).
// nullptr if that is none of kernel_names().
const Kernels* chosen_kernels();

}  // namespace qcompile
