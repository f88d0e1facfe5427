// One tile of attention (AttentionTile), in g++'s and clang's vectors: each instruction set says how long they are.
//
// Included by reference.cpp and the files of one instruction set each, and compiled with the flags of each. Everything is in
// an unnamed namespace, so that no copy of a function is offered to the linker for files of another one.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "hadamard.h"
#include "swiglu.h"

namespace qcompile {
namespace {

// Set gives: Vector of kLanes numbers, aligned as they are; kTileRows and kTileVectors, of a product's sums in registers;
// turn, which transposes kLanes rows of kLanes numbers; from_half; wide, a vector of float16 or int8 numbers; four and join,
// which make a vector of the sums of kLanes vectors.
template <typename Set>
struct Attend {
  static constexpr int kLanes = Set::kLanes, kVectors = Set::kTileVectors;
  static constexpr int64_t kFew = 16;  // rows, that wait for memory
  using Vector = typename Set::Vector;

  static Vector& at(float* x) { return *reinterpret_cast<Vector*>(x); }
  static const Vector& at(const float* x) { return *reinterpret_cast<const Vector*>(x); }

  struct Matrix {
    const float* data;
    int64_t stride;
  };

  // c (kRows, kCount vectors) = a (kRows, depth) b (depth, kCount vectors), added to c where it holds something.
  template <int kRows, int kCount, bool kAdd>
  static void product(Matrix a, Matrix b, int64_t depth, float* c, int64_t stride) {
    Vector sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kCount; ++j) sums[r][j] = kAdd ? at(c + r * stride + j * kLanes) : Vector{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vector wide[kCount];
      for (int j = 0; j < kCount; ++j) wide[j] = at(b.data + k * b.stride + j * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const float x = a.data[r * a.stride + k];
        for (int j = 0; j < kCount; ++j) sums[r][j] += x * wide[j];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kCount; ++j) at(c + r * stride + j * kLanes) = sums[r][j];
    }
  }

  template <int kRows, bool kAdd>
  static void all_columns(Matrix a, Matrix b, int64_t depth, float* c, int64_t stride, int64_t columns) {
    int64_t j = 0;
    for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) {
      product<kRows, kVectors, kAdd>(a, {b.data + j, b.stride}, depth, c + j, stride);
    }
    for (; j < columns; j += kLanes) product<kRows, 1, kAdd>(a, {b.data + j, b.stride}, depth, c + j, stride);
  }

  // As many rows at once as fit, then what is left.
  template <int kRows, bool kAdd>
  static void all_rows(Matrix a, int64_t rows, Matrix b, int64_t depth, float* c, int64_t stride, int64_t columns) {
    for (; rows >= kRows; rows -= kRows, a.data += kRows * a.stride, c += kRows * stride) {
      all_columns<kRows, kAdd>(a, b, depth, c, stride, columns);
    }
    if constexpr (kRows > 1) {
      if (rows > 0) all_rows<kRows - 1, kAdd>(a, rows, b, depth, c, stride, columns);
    }
  }

  static void decode(CacheType type, const uint8_t* from, float* to, int64_t count) {
    if (type == CacheType::kFloat) {
      __builtin_memcpy(to, from, size_t(count) * 4);
    } else if (type == CacheType::kHalf) {
      Set::from_half(reinterpret_cast<const uint16_t*>(from), to, count);
    } else {
      const int8_t* codes = reinterpret_cast<const int8_t*>(from);
      for (int64_t i = 0; i < count; ++i) to[i] = float(codes[i]);
    }
  }

  // (count, width) of a cache as floats: where they lie, or decoded into `to`, with zeros behind each row.
  static Matrix rows_of(const AttentionTile& tile, const uint8_t* cache, int64_t first, int64_t count, float* to) {
    const int64_t bytes = tile.width * bytes_of(tile.type);
    const uint8_t* from = cache + first * bytes;
    if (tile.type == CacheType::kFloat && tile.width == tile.stride) return {reinterpret_cast<const float*>(from), tile.stride};
    if (tile.width == tile.stride) {
      decode(tile.type, from, to, count * tile.width);
      return {to, tile.stride};
    }
    for (int64_t i = 0; i < count; ++i) {
      decode(tile.type, from + i * bytes, to + i * tile.stride, tile.width);
      std::fill(to + i * tile.stride + tile.width, to + (i + 1) * tile.stride, 0.0f);
    }
    return {to, tile.stride};
  }

  // What is read next is fetched little by little while there is something to compute: memory that is asked for at once
  // has the processor wait.
  struct Fetch {
    static constexpr int64_t kLine = 64;
    const uint8_t *keys, *values;
    int64_t bytes, steps, done = 0;

    void step() {
      const int64_t until = std::min(bytes, done + (bytes / steps + kLine) / kLine * kLine);
      for (; done < until; done += kLine) {
        __builtin_prefetch(keys + done, 0, 2);
        __builtin_prefetch(values + done, 0, 2);
      }
    }
  };

  // turned (width, kKeysAtOnce): a column a key, and zeros up to a whole vector of them.
  static void turn(const Matrix& keys, int64_t count, int64_t width, float* turned, Fetch& fetch) {
    float some[kLanes * kLanes];
    for (int64_t key = 0; key < count; key += kLanes) {
      if (key % 16 == 0) fetch.step();
      const int64_t whole = std::min<int64_t>(kLanes, count - key);
      for (int64_t i = 0; i < width; i += kLanes) {
        const float* from = keys.data + key * keys.stride + i;
        int64_t stride = keys.stride;
        if (whole < kLanes) {
          for (int64_t row = 0; row < kLanes; ++row) {
            for (int64_t j = 0; j < kLanes; ++j) some[row * kLanes + j] = row < whole ? from[row * stride + j] : 0.0f;
          }
          from = some;
          stride = kLanes;
        }
        Set::turn(from, stride, turned + i * kKeysAtOnce + key, kKeysAtOnce);
      }
    }
  }

  static float largest(const float* x, int64_t n) {
    Vector most = at(x);
    for (int64_t i = kLanes; i < n; i += kLanes) most = at(x + i) > most ? at(x + i) : most;
    float found = most[0];
    for (int i = 1; i < kLanes; ++i) found = std::max(found, most[i]);
    return found;
  }

  static float total(const float* x, int64_t n) {
    Vector sum = at(x);
    for (int64_t i = kLanes; i < n; i += kLanes) sum += at(x + i);
    float found = 0;
    for (int i = 0; i < kLanes; ++i) found += sum[i];
    return found;
  }

  // Scores (columns,) of one row of queries become e^(score - most), zeros where it may not read. columns: whole vectors.
  static void soften(const AttentionTile& tile, int64_t row, int64_t key, int64_t count, int64_t columns, float* scores) {
    const int64_t first = std::clamp<int64_t>(tile.first[row] - key, 0, count);
    const int64_t last = std::clamp<int64_t>(tile.last[row] - key, first, count);
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    if (tile.softcap > 0) {
      for (int64_t i = 0; i < columns; ++i) {
        const float e = limited_exp(scores[i] * (2.0f / tile.softcap));
        scores[i] = tile.softcap * (1.0f - 2.0f / (e + 1.0f));
      }
    }
    if (tile.bias) {
      const float* bias = tile.bias[row] + key;
      for (int64_t i = first; i < last; ++i) scores[i] += bias[i];
    }
    std::fill(scores, scores + first, kNone);
    std::fill(scores + last, scores + columns, kNone);
    const float before = tile.most[row], most = std::max(before, largest(scores, columns));
    if (most == kNone && total(scores, columns) == kNone) {  // else there is a NaN, which stays one
      std::fill(scores, scores + columns, 0.0f);
      return;
    }
    for (int64_t i = 0; i < columns; ++i) scores[i] = limited_exp(scores[i] - most);
    std::fill(scores, scores + first, 0.0f);
    std::fill(scores + last, scores + columns, 0.0f);
    const float kept = before == most ? 1.0f : before > kNone ? limited_exp(before - most) : 0.0f;
    tile.sum[row] = tile.sum[row] * kept + total(scores, columns);
    tile.most[row] = most;
    if (kept == 1.0f) return;
    float* out = tile.out + row * tile.stride;
    for (int64_t i = 0; i < tile.stride; ++i) out[i] *= kept;
  }

  // c (+)= a b, few rows in steps between which something is fetched.
  template <bool kAdd>
  static void multiply(Matrix a, int64_t rows, Matrix b, int64_t depth, float* c, int64_t stride, int64_t columns, Fetch& fetch) {
    if (rows > kFew) return all_rows<Set::kTileRows, kAdd>(a, rows, b, depth, c, stride, columns);
    const int64_t step = std::max<int64_t>(16, (depth + 3) / 4);
    for (int64_t k = 0; k < depth; k += step) {
      const Matrix own = {a.data + k, a.stride}, other = {b.data + k * b.stride, b.stride};
      const int64_t count = std::min(step, depth - k);
      if (kAdd || k > 0) {
        all_rows<Set::kTileRows, true>(own, rows, other, count, c, stride, columns);
      } else {
        all_rows<Set::kTileRows, false>(own, rows, other, count, c, stride, columns);
      }
      fetch.step();
    }
  }

  // ---- few rows: each number of the caches is read once or twice, so none is decoded into memory or turned

  template <CacheType type>
  static Vector load(const uint8_t* numbers) {
    if constexpr (type == CacheType::kFloat) return at(reinterpret_cast<const float*>(numbers));
    if constexpr (type == CacheType::kHalf) return Set::wide(reinterpret_cast<const uint16_t*>(numbers));
    if constexpr (type == CacheType::kInt8) return Set::wide(reinterpret_cast<const int8_t*>(numbers));
  }

  // scores (kRows, kKeysAtOnce) of rows from `row` on; those of the last vector's keys behind `count` are not theirs.
  template <CacheType type, int kRows>
  static void multiply_keys(const AttentionTile& tile, int64_t row, int64_t key, int64_t count, float* scores, Fetch& fetch) {
    constexpr int kFours = kLanes / 4;
    const int64_t bytes = tile.width * bytes_of(type);
    const float* q = tile.q + row * tile.stride;
    for (int64_t first = 0; first < count; first += kLanes) {
      Vector quarters[kRows][kFours];
      for (int f = 0; f < kFours; ++f) {
        const uint8_t* keys[4];
        for (int i = 0; i < 4; ++i) keys[i] = tile.keys + (key + std::min(first + 4 * f + i, count - 1)) * bytes;
        Vector sums[kRows][4] = {};
        for (int64_t j = 0; j < tile.width; j += kLanes) {
          Vector k[4];
          for (int i = 0; i < 4; ++i) k[i] = load<type>(keys[i] + j * bytes_of(type));
          for (int r = 0; r < kRows; ++r) {
            const Vector x = at(q + r * tile.stride + j);
            for (int i = 0; i < 4; ++i) sums[r][i] += x * k[i];
          }
        }
        for (int r = 0; r < kRows; ++r) quarters[r][f] = Set::four(sums[r]);
        if (row == 0) fetch.step();
      }
      for (int r = 0; r < kRows; ++r) at(scores + r * kKeysAtOnce + first) = Set::join(quarters[r]);
    }
  }

  // out += weights (kRows, kKeysAtOnce) times the values, of rows from `row` on.
  template <CacheType type, int kRows>
  static void add_values(const AttentionTile& tile, int64_t row, int64_t key, int64_t count, const float* weights,
                         Fetch& fetch) {
    for (int64_t j = 0; j < tile.width; j += kVectors * kLanes) {
      const auto part = [&](auto vectors) {
        const bool fetches = row == 0 && j == 0;
        add_columns<type, kRows, vectors>(tile, row, key, count, weights, j, fetch, fetches);
      };
      if (tile.width - j >= kVectors * kLanes) {
        part(std::integral_constant<int, kVectors>());
      } else {
        for (; j < tile.width; j += kLanes) part(std::integral_constant<int, 1>());
      }
    }
  }

  template <CacheType type, int kRows, int kCount>
  static void add_columns(const AttentionTile& tile, int64_t row, int64_t key, int64_t count, const float* weights,
                          int64_t column, Fetch& fetch, bool fetches) {
    const int64_t bytes = tile.width * bytes_of(type);
    const uint8_t* values = tile.values + key * bytes + column * bytes_of(type);
    float* out = tile.out + row * tile.stride + column;
    Vector sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kCount; ++i) sums[r][i] = at(out + r * tile.stride + i * kLanes);
    }
    for (int64_t n = 0; n < count; ++n, values += bytes) {
      Vector v[kCount];
      for (int i = 0; i < kCount; ++i) v[i] = load<type>(values + i * kLanes * bytes_of(type));
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kKeysAtOnce + n];
        for (int i = 0; i < kCount; ++i) sums[r][i] += weight * v[i];
      }
      if (fetches && n % 8 == 7) fetch.step();
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kCount; ++i) at(out + r * tile.stride + i * kLanes) = sums[r][i];
    }
  }

  // work(type, count, row) for all rows, up to four at once.
  template <typename Work>
  static void by_rows(const AttentionTile& tile, const Work& work) {
    const auto of_type = [&](auto type) {
      for (int64_t row = 0; row < tile.rows; row += 4) {
        const int64_t left = tile.rows - row;
        if (left >= 4) work(type, std::integral_constant<int, 4>(), row);
        if (left == 3) work(type, std::integral_constant<int, 3>(), row);
        if (left == 2) work(type, std::integral_constant<int, 2>(), row);
        if (left == 1) work(type, std::integral_constant<int, 1>(), row);
      }
    };
    if (tile.type == CacheType::kFloat) of_type(std::integral_constant<CacheType, CacheType::kFloat>());
    if (tile.type == CacheType::kHalf) of_type(std::integral_constant<CacheType, CacheType::kHalf>());
    if (tile.type == CacheType::kInt8) of_type(std::integral_constant<CacheType, CacheType::kInt8>());
  }

  static void run(const AttentionTile& tile) {
    float *turned = tile.scratch, *plain = turned + kKeysAtOnce * tile.stride, *scores = plain + kKeysAtOnce * tile.stride;
    const int64_t bytes = tile.width * bytes_of(tile.type);
    for (int64_t key = tile.begin; key < tile.end; key += kKeysAtOnce) {
      const int64_t count = std::min(kKeysAtOnce, tile.end - key), columns = (count + kLanes - 1) / kLanes * kLanes;
      const int64_t next = key + kKeysAtOnce, ahead = tile.rows > kFew ? 0 : std::clamp<int64_t>(tile.held - next, 0, kKeysAtOnce);
      const bool few = tile.rows <= kFew && tile.width == tile.stride;
      Fetch fetch = {tile.keys + next * bytes, tile.values + next * bytes, ahead * bytes, few ? 24 : 12};
      if (few) {
        const auto score = [&](auto type, auto rows, int64_t row) {
          multiply_keys<type, rows>(tile, row, key, count, scores + row * kKeysAtOnce, fetch);
        };
        by_rows(tile, score);
        for (int64_t row = 0; row < tile.rows; ++row) soften(tile, row, key, count, columns, scores + row * kKeysAtOnce);
        const auto add = [&](auto type, auto rows, int64_t row) {
          add_values<type, rows>(tile, row, key, count, scores + row * kKeysAtOnce, fetch);
        };
        by_rows(tile, add);
        continue;
      }
      turn(rows_of(tile, tile.keys, key, count, plain), count, tile.stride, turned, fetch);
      multiply<false>({tile.q, tile.stride}, tile.rows, {turned, kKeysAtOnce}, tile.width, scores, kKeysAtOnce, columns, fetch);
      for (int64_t row = 0; row < tile.rows; ++row) soften(tile, row, key, count, columns, scores + row * kKeysAtOnce);
      multiply<true>({scores, kKeysAtOnce}, tile.rows, rows_of(tile, tile.values, key, count, plain), count, tile.out,
                     tile.stride, tile.stride, fetch);
    }
  }
};

}  // namespace
}  // namespace qcompile
