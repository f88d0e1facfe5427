// Attention over a decoder's caches: new keys and values are appended, then every row of queries reads all that it may.
//
// Softmax over positions is taken block by block of keys (online softmax; Milakov and Gimelshein 2018, Dao et al. 2022):
// no matrix of scores is kept. A head of the caches, with all heads of queries that share it, is one piece of work; where
// there are few rows of queries, parts of its positions are pieces of their own, put together at the end.
#pragma once

#include "matmul.h"

namespace qcompile {

constexpr int64_t kMaxWidth = 1024;    // of a head
constexpr int64_t kMaxPairs = kMaxWidth / 2;
constexpr int64_t kKeysAtOnce = 64;  // of a block: decoded, or turned, once for all rows of a tile

// How a row of a cache, `width` numbers of one position and head, is stored.
enum class CacheType { kFloat, kHalf, kInt8 };

constexpr int64_t bytes_of(CacheType type) { return type == CacheType::kFloat ? 4 : type == CacheType::kHalf ? 2 : 1; }

// Rows of queries against a run of positions of one head of the caches. What is computed is added to out, most and sum.
struct AttentionTile {
  int64_t rows, width, stride;  // stride: of q and out, width rounded up so that vectors fit
  const float* q;               // (rows, stride), scaled
  const uint8_t *keys, *values;  // (positions, width) of type
  CacheType type;
  int64_t begin, end, held;              // positions, and how many there are: those behind `end` are read soon
  const int64_t *first, *last;           // (rows,): of positions that a row may read
  const float* const* bias;              // nullptr, or (rows,) of pointers to numbers for all positions, added to scores
  float softcap;                         // 0: none
  float *out, *most, *sum;  // (rows, stride), (rows,), (rows,): Σ e^(s - most) v, largest score, Σ e^(s - most)
  float* scratch;           // attention_scratch(rows, stride) numbers
};

// Keys turned, keys or values as floats, and scores.
constexpr int64_t attention_scratch(int64_t rows, int64_t stride) { return kKeysAtOnce * (2 * stride + rows); }

// Queries, keys and values of one run: float32 or float16 numbers.
struct Given {
  const void* data;
  int64_t row;  // numbers from one row, of one token, to the next
  bool half;
};

// One run. Shapes are those of com.microsoft GroupQueryAttention.
struct Attention {
  int64_t batch, rows, heads, groups, width;
  Given query, key, value;  // (batch, rows, heads or groups, width)
  CacheType type;
  // (batch, groups, past or room, width). past and present may be one buffer.
  const uint8_t *past_key, *past_value;
  uint8_t *present_key, *present_value;
  int64_t past, room;
  const int32_t* last;  // (batch,): the last position that each sequence will have
  bool prompt;          // no sequence has any position yet
  float scale, softcap;
  int64_t window;  // positions that a row reads at most, its own included; 0: all
  // Rotation, if any: tables (positions, pairs), which of their rows each row takes (batch, rows), or as positions count.
  const void *cos, *sin;
  int64_t pairs, table_rows;
  bool interleaved, tables_half;
  const int64_t* position;
  // Added to scores, float32 or float16 (batch or 1, heads or 1, rows, positions); nullptr: nothing.
  const void* bias;
  int64_t bias_batch, bias_heads, bias_positions;
  bool bias_half;
  // Scales of int8 codes, (groups, width) or one.
  const float *key_scale, *value_scale;
  bool key_channels, value_channels;
  void* out;  // (batch, rows, heads, width), of the type of queries

  int64_t sharing() const { return heads / groups; }
  // Positions that a sequence has before this run.
  int64_t before(int64_t sequence) const { return prompt ? 0 : int64_t(last[sequence]) + 1 - rows; }
};

// Throws std::bad_alloc. Scratch is kept by each thread, and pieces allocate it: on other threads too, so `parallel` must
// catch std::bad_alloc there and throw it on the calling one, as Pool::run (pool.h) does.
void attend(const Attention& attention, const Kernels& kernels, const Parallel& parallel);

}  // namespace qcompile
